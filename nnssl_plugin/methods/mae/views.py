"""Which blocks of an image are masked, and which voxels lie in the case."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.errors import UserError

LARGEST_BLOCK, SMALLEST_BLOCK = 16, 4
"""Voxels along the edge of a block that is chosen here."""
BLOCKS_PER_AXIS = 4
"""That should fit into a small window."""


def block_edge(size: Sequence[int]) -> int:
    """Edge of a window's blocks in voxels: 16, in a small window the largest power of two of which 4 fit on each axis,
    never less than 4."""
    edge = LARGEST_BLOCK
    while edge > SMALLEST_BLOCK and min(size) < BLOCKS_PER_AXIS * edge:
        edge //= 2
    return edge


def visible_count(size: Sequence[int], edges: Sequence[int], ratio: float) -> tuple[int, int]:
    """Blocks of a window, and how many of them stay visible: all but floor(n · ratio).

    Args:
        size: of the window in voxels.
        edges: of a block in voxels; a block that is cut at the end of an axis counts as one.
        ratio: share to mask, in (0, 1).

    Raises:
        UserError: when the window has too few blocks to mask one.
    """
    total = math.prod(math.ceil(length / edge) for length, edge in zip(size, edges, strict=True))
    masked = math.floor(total * ratio + 1e-9)  # 10 · 0.7 is 6.9999…99 in floating point
    if masked == 0:
        raise UserError(
            f"Of {total} blocks of {'x'.join(map(str, edges))} voxels in a window of {'x'.join(map(str, size))}, a "
            f"share of {ratio:g} masks none.",
            "Take smaller blocks or a larger share: nnssl_plugin plan -d ID -p PLANS -n NAME --set method.block=4",
        )
    return total, total - masked


def inside_case(origin: Tensor, case_shape: Tensor, size: Sequence[int]) -> Tensor:
    """Which voxels of a window lie in its case, (B, 1, *size) bool; the others were padded.

    Args:
        origin: (B, d), voxel of the case at which the window begins, negative where it begins before the case.
        case_shape: (B, d), size of the case in voxels.
        size: of the window in voxels.
    """
    inside = torch.ones(len(origin), 1, *size, dtype=torch.bool, device=origin.device)
    for axis, length in enumerate(size):
        voxel = origin[:, axis, None] + torch.arange(length, device=origin.device)
        holds = (voxel >= 0) & (voxel < case_shape[:, axis, None])
        inside &= holds.reshape(len(origin), *(length if a == axis + 1 else 1 for a in range(len(size) + 1)))
    return inside
