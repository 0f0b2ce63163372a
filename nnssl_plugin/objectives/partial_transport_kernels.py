"""Triton's kernel of ``partial_transport.py``: all iterations of a problem in one launch."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnssl_plugin.objectives.partial_transport import ABSORB_EVERY

ENTRIES_PER_WARP = 256


def bregman_projections(kernel: Tensor, *, mass: float, iterations: int, tolerance: float) -> Tensor:
    """See ``partial_transport._bregman_projections``; each problem ends on its own, and the host waits for nothing.

    Sizes, mass and tolerance are constants of the kernel: as its arguments they would be rounded to float32.

    Args:
        kernel: −C/ε, (..., n, m), float64, n and m at most ``LARGEST``.
        mass: s.
        iterations: greatest number of iterations.
        tolerance: a problem ends when no entry of log π changed by more between two absorptions.

    Returns:
        log π, (..., n, m).
    """
    kernel = kernel.contiguous()
    log_plan = torch.empty_like(kernel)
    rows, columns = kernel.shape[-2:]
    padded = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    _project[(kernel.shape[:-2].numel(),)](
        kernel,
        log_plan,
        iterations,
        N=rows,
        M=columns,
        MASS=mass,
        LOG_MASS=math.log(mass),
        TOLERANCE=tolerance,
        EVERY=ABSORB_EVERY,
        ROWS=padded[0],
        COLUMNS=padded[1],
        num_warps=max(1, padded[0] * padded[1] // ENTRIES_PER_WARP),
    )
    return log_plan


@triton.jit
def _project(
    kernel,
    log_plan_of,
    iterations,
    N: tl.constexpr,
    M: tl.constexpr,
    MASS: tl.constexpr,
    LOG_MASS: tl.constexpr,
    TOLERANCE: tl.constexpr,
    EVERY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One problem. Rows and columns that pad it hold no mass, and factors of 1."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < M)[None, :]
    place = tl.program_id(0).to(tl.int64) * N * M + row[:, None] * M + column[None, :]
    log_plan = tl.load(kernel + place, mask=inside, other=float("-inf"))
    highest = tl.max(tl.max(log_plan, 1), 0)
    log_plan = log_plan - (highest + tl.log(tl.sum(tl.sum(tl.exp(log_plan - highest), 1), 0))) + LOG_MASS
    row_bound, column_bound = tl.full([ROWS], 1.0, tl.float64), tl.full([COLUMNS], 1.0, tl.float64)
    done, moved = 0, tl.sum(tl.full([1], TOLERANCE, tl.float64), 0)
    while (done < iterations) & (moved >= TOLERANCE):
        plan = tl.exp(log_plan)
        u, v = tl.full([ROWS], 1.0, tl.float64), tl.full([COLUMNS], 1.0, tl.float64)
        room = tl.sum(tl.full([1], 1 / N, tl.float64), 0)
        for _ in range(0, tl.minimum(EVERY, iterations - done)):
            u = tl.minimum(room / tl.sum(plan * v[None, :], 1), row_bound, propagate_nan=tl.PropagateNan.ALL)
            sums = tl.sum(u[:, None] * plan, 0) * (M / N)
            v = tl.minimum(room / sums, column_bound, propagate_nan=tl.PropagateNan.ALL)
            room = tl.sum(sums * v, 0) * (1 / (M * MASS))
        row_bound, column_bound = row_bound / u, column_bound / v
        change = tl.log(u)[:, None] + (tl.log(v) - tl.log(room * N))[None, :]
        log_plan += change
        moved = tl.max(tl.max(tl.where(inside, tl.abs(change), 0.0), 1), 0)
        done += EVERY
    tl.store(log_plan_of + place, log_plan, mask=inside)
