"""Which blocks of an image are masked."""

import math
from collections.abc import Sequence

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
