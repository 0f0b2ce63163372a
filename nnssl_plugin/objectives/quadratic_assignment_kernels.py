"""Triton's kernel of the searches by swaps in ``quadratic_assignment.py``: a program for each permutation."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def search(gradient: Tensor, pair: Tensor, permutations: Tensor, rounding: Tensor, *, steps: int, tabu: bool) -> Tensor:
    """The swaps of ``ascend``, or those of ``tabu_search``; no argument is changed.

    Args:
        gradient: of the objective at each permutation, (P, n²).
        pair: (G, n², n²).
        permutations: (G, S, n) with G · S = P.
        rounding: (P,) what a gain must exceed.
        steps: their greatest number.
        tabu: which search.

    Returns:
        (P, n) int64.
    """
    starts, n = permutations.shape[1:]
    here = permutations.flatten(0, 1).to(torch.int32).contiguous()
    best, rows = here.clone(), torch.triu_indices(n, n, 1, dtype=torch.int32, device=here.device)
    if len(here):
        until = torch.zeros_like(gradient, dtype=torch.int32) if tabu else here
        _search[(len(here),)](
            pair.contiguous(),
            gradient.clone(memory_format=torch.contiguous_format),
            here,
            best,
            until,
            rounding,
            rows,
            n,
            steps,
            starts,
            rows.shape[1],
            SWAPS=triton.next_power_of_2(rows.shape[1]),
            PLACES=triton.next_power_of_2(n * n),
            NODES=triton.next_power_of_2(n),
            TABU=tabu,
            num_warps=1 if n <= 16 else 4,
        )
    return best.long()


@triton.jit
def _search(
    pair,
    gradient,
    permutations,
    best,
    until,
    rounding,
    rows,
    n,
    steps,
    starts,
    swaps,
    SWAPS: tl.constexpr,
    PLACES: tl.constexpr,
    NODES: tl.constexpr,
    TABU: tl.constexpr,
):
    """Swaps are numbered by w; p0 and p1 are the places of both rows before a swap, p2 and p3 those after it."""
    number = tl.program_id(0).to(tl.int64)
    square = n * n
    pair += number // starts * square * square
    gradient += number * square
    until += number * square
    permutations += number * n
    best += number * n
    w = tl.arange(0, SWAPS)
    real = w < swaps
    i = tl.load(rows + w, mask=real, other=0)
    j = tl.load(rows + swaps + w, mask=real, other=0)
    places = tl.arange(0, PLACES)
    inside = places < square
    nodes = tl.arange(0, NODES)
    least = tl.load(rounding + number)
    below = least * 0.0  # how far the walk is below its best
    step = n * 0
    going = step == 0
    while going & (step < steps):
        a = tl.load(permutations + i)
        b = tl.load(permutations + j)
        p0 = i * n + a
        p1 = j * n + b
        p2 = i * n + b
        p3 = j * n + a
        gain = tl.load(gradient + p2) + tl.load(gradient + p3) - (tl.load(gradient + p0) + tl.load(gradient + p1))
        gain += tl.load(pair + p0 * square + p1) + tl.load(pair + p2 * square + p3)
        gain = tl.where(real, gain, float("-inf"))
        allowed = gain
        if TABU:
            banned = tl.minimum(tl.load(until + p2), tl.load(until + p3)) > step
            allowed = tl.where(banned & (gain <= below + least), float("-inf"), gain)
        chosen = w == tl.argmax(allowed, 0)
        value = tl.sum(tl.where(chosen, gain, 0.0), 0)
        going = TABU or value > least
        i0 = tl.sum(tl.where(chosen, i, 0), 0)
        j0 = tl.sum(tl.where(chosen, j, 0), 0)
        a0 = tl.sum(tl.where(chosen, a, 0), 0)
        b0 = tl.sum(tl.where(chosen, b, 0), 0)
        tl.debug_barrier()  # all have read what is written now
        if going:
            change = tl.load(pair + (i0 * n + b0) * square + places, mask=inside, other=0.0)
            change += tl.load(pair + (j0 * n + a0) * square + places, mask=inside, other=0.0)
            change -= tl.load(pair + (i0 * n + a0) * square + places, mask=inside, other=0.0)
            change -= tl.load(pair + (j0 * n + b0) * square + places, mask=inside, other=0.0)
            old = tl.load(gradient + places, mask=inside, other=0.0)
            tl.store(gradient + places, old + change, mask=inside)
            moved = tl.load(permutations + nodes, mask=nodes < n, other=0)
            moved = tl.where(nodes == i0, b0, tl.where(nodes == j0, a0, moved))
            tl.store(permutations + nodes, moved, mask=nodes < n)
            below -= value
            if TABU:
                free = step + n // 2 + 7 * step % (n // 2 + 1)
                tl.store(until + i0 * n + a0, free)
                tl.store(until + j0 * n + b0, free)
                if below < 0:
                    tl.store(best + nodes, moved, mask=nodes < n)
                below = tl.maximum(below, 0.0)
            else:
                tl.store(best + nodes, moved, mask=nodes < n)
        tl.debug_barrier()
        step += 1
