"""Triton's kernel of :func:`nnssl_plugin.objectives.assignment.linear_assignment`: a program for each problem."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def shortest_augmenting_paths(affinity: Tensor) -> Tensor:
    """As its namesake in ``assignment.py``, whose paths and prices it follows: (..., n, n) → (..., n) int64."""
    n = affinity.shape[-1]
    cost = -affinity.detach().reshape(-1, n, n).to(torch.promote_types(affinity.dtype, torch.float32)).contiguous()
    columns = torch.empty(cost.shape[:2], dtype=torch.int64, device=cost.device)
    if columns.numel():
        _assign[(len(cost),)](cost, columns, n, LANES=max(2, triton.next_power_of_2(n)), num_warps=1)
    return columns.view(affinity.shape[:-1])


@triton.jit
def _assign(cost, columns, n, LANES: tl.constexpr):
    """Vectors have one lane for each row or column. Loops are bounded, whatever the numbers are."""
    at = tl.arange(0, LANES)
    inside = at < n
    cost += tl.program_id(0).to(tl.int64) * n * n
    price = tl.load(cost + at, mask=inside, other=0.0) * 0.0  # dual variables of the columns
    row_of = tl.full((LANES,), -1, tl.int32)
    column_of = tl.full((LANES,), -1, tl.int32)
    for row in range(n):
        came_from = tl.zeros((LANES,), tl.int32) + row
        distance = tl.where(inside, tl.load(cost + row * n + at, mask=inside, other=0.0) - price, float("inf"))
        reached = at < 0
        free = row * 0 - 1
        tries = row * 0
        while (free < 0) & (tries <= n):
            tries += 1
            ahead = tl.where(reached, float("inf"), distance)
            length = tl.min(ahead, 0)
            column = tl.argmin(ahead, 0)
            here = tl.sum(tl.where(at == column, row_of, 0), 0)
            free = tl.where(here < 0, column, -1)
            if here >= 0:
                reached = reached | (at == column)
                reduced = tl.load(cost + here * n + at, mask=inside, other=0.0) - price
                reduced = length + reduced - tl.sum(tl.where(at == column, reduced, 0.0), 0)
                nearer = (reduced < distance) & (~reached) & inside
                distance = tl.where(nearer, reduced, distance)
                came_from = tl.where(nearer, here, came_from)
        length = tl.sum(tl.where(at == free, distance, 0.0), 0)
        price = tl.where(reached, price + distance - length, price)
        column = free
        going = free >= 0
        tries = row * 0
        while going & (tries <= n):
            tries += 1
            here = tl.sum(tl.where(at == column, came_from, 0), 0)
            given_up = tl.sum(tl.where(at == here, column_of, 0), 0)
            row_of = tl.where(at == column, here, row_of)
            column_of = tl.where(at == here, column, column_of)
            going = here != row
            column = given_up
    tl.store(columns + tl.program_id(0).to(tl.int64) * n + at, column_of.to(tl.int64), mask=inside)
