"""Linear assignment of many small square problems at once: which column every row gets, so that the sum is largest.

Shapes: ``n`` rows and columns; ``...`` is any batch of independent problems. A permutation is given as the column of
every row, (..., n) int64.
"""

import functools
import importlib.util

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def linear_assignment(affinity: Tensor) -> Tensor:
    """The permutation p with the largest Σ_i affinity[i, p(i)], exactly.

    A CPU solves one problem after the other with SciPy, some µs for n = 16 and many times faster there than
    :func:`shortest_augmenting_paths`, which other devices run for all problems at once without the host, CUDA with
    Triton as one kernel.

    Args:
        affinity: (..., n, n), finite.

    Returns:
        (..., n) int64.

    Raises:
        ValueError: for matrices that are not square, and on a CPU for NaN.
    """
    if affinity.shape[-1] != affinity.shape[-2]:
        raise ValueError(f"affinity must be square, not {affinity.shape[-2]} × {affinity.shape[-1]}")
    with torch.no_grad():
        if affinity.device.type == "cpu":
            return _one_by_one(affinity)
        if has_kernels(affinity):
            from nnssl_plugin.objectives import assignment_kernels  # needs Triton

            return assignment_kernels.shortest_augmenting_paths(affinity)
        return shortest_augmenting_paths(affinity)


def has_kernels(values: Tensor) -> bool:
    """Whether Triton's kernels can be used on these numbers."""
    return values.device.type == "cuda" and _has_triton()


def shortest_augmenting_paths(affinity: Tensor) -> Tensor:
    """:func:`linear_assignment` by shortest augmenting paths, vectorised over the problems.

    Row after row enters by the shortest path to a free column, found by Dijkstra's algorithm on reduced costs (Jonker
    and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems", Computing
    38, 1987). A problem whose path is found waits for the others; the loops have fixed lengths, n (n + 1) in all, and
    nothing is read on the host.

    Args:
        affinity: (..., n, n), finite and floating point.

    Returns:
        (..., n) int64.
    """
    n = affinity.shape[-1]
    cost = -affinity.detach().reshape(-1, n, n)
    price = cost.new_zeros(cost.shape[:2])  # dual variables of the columns
    row_of = torch.full_like(price, -1, dtype=torch.long)  # (problems, columns), −1 where free
    column_of = torch.full_like(row_of, -1)
    for row in range(n):
        free, came_from, distance, reached = _shortest_path(cost, price, row_of, column_of, row)
        length = distance.gather(1, free[:, None])
        price = torch.where(reached, price + distance - length, price)
        row_of, column_of = _augment(row_of, column_of, free, came_from, row)
    return column_of.reshape(affinity.shape[:-1])


def _shortest_path(
    cost: Tensor, price: Tensor, row_of: Tensor, column_of: Tensor, row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From a row that is not assigned to the nearest free column.

    Returns:
        The free column (problems,); the row before every column, the distances and which columns were reached before
        the free one, (problems, n).
    """
    problems = torch.arange(len(cost), device=cost.device)
    here = torch.full_like(problems, row)
    free = torch.full_like(problems, -1)
    came_from = torch.full_like(row_of, row)
    distance = cost[:, row] - price
    reached = torch.zeros_like(price, dtype=torch.bool)
    for _ in range(row + 1):  # at most `row` columns are taken
        length, column = distance.masked_fill(reached, torch.inf).min(1)
        found = row_of.gather(1, column[:, None]).squeeze(1) < 0
        free = torch.where((free < 0) & found, column, free)
        going = free < 0
        reached = reached | (going[:, None] & (_indices(cost) == column[:, None]))
        here = torch.where(going, row_of.gather(1, column[:, None]).squeeze(1), row)
        own = column_of.gather(1, here[:, None])  # the column that `here` gives up, whose reduced cost is 0
        reduced = cost[problems, here] - price
        reduced = length[:, None] + reduced - reduced.gather(1, own.clamp(min=0))
        nearer = (reduced < distance) & ~reached & going[:, None]
        distance = torch.where(nearer, reduced, distance)
        came_from = torch.where(nearer, here[:, None], came_from)
    return free, came_from, distance, reached


def _augment(row_of: Tensor, column_of: Tensor, free: Tensor, came_from: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Every row on the path from ``row`` to the free column gets the next column of the path."""
    column, going = free[:, None], torch.ones_like(free[:, None], dtype=torch.bool)
    row_of, column_of = row_of.clone(), column_of.clone()
    for _ in range(row + 1):
        here = came_from.gather(1, column)
        given_up = column_of.gather(1, here)
        row_of.scatter_(1, column, torch.where(going, here, row_of.gather(1, column)))
        column_of.scatter_(1, here, torch.where(going, column, given_up))
        going = going & (here != row)
        column = torch.where(going, given_up, column)
    return row_of, column_of


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _indices(cost: Tensor) -> Tensor:
    return torch.arange(cost.shape[-1], device=cost.device)


def _one_by_one(affinity: Tensor) -> Tensor:
    n = affinity.shape[-1]
    problems = affinity.detach().double().reshape(-1, n, n).numpy()
    columns = [linear_sum_assignment(problem, maximize=True)[1] for problem in problems]
    return torch.from_numpy(np.reshape(columns, affinity.shape[:-1]).astype(np.int64))
