"""An image as the sequence of its patches, and back, in 2D and 3D."""

import math
from collections.abc import Sequence

from torch import Tensor


def grid_of(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Patches per axis of an image whose size in voxels they divide."""
    return tuple(length // edge for length, edge in zip(size, patch, strict=True))


def patchify(image: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, *spatial) → (B, N, P): patches in the order of a flattened map, the P = C · voxels numbers of each."""
    grid = grid_of(image.shape[2:], patch)
    axes = len(grid)
    cut = [size for pair in zip(grid, patch, strict=True) for size in pair]
    places, voxels = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return (
        image.reshape(*image.shape[:2], *cut).permute(0, *places, 1, *voxels).reshape(len(image), math.prod(grid), -1)
    )


def unpatchify(patches: Tensor, patch: Sequence[int], grid: Sequence[int]) -> Tensor:
    """(B, N, P) → (B, C, *spatial), the inverse of :func:`patchify`."""
    axes = len(grid)
    channels = patches.shape[2] // math.prod(patch)
    split = patches.reshape(len(patches), *grid, channels, *patch)
    order = [axis for pair in zip(range(1, 1 + axes), range(2 + axes, 2 + 2 * axes), strict=True) for axis in pair]
    size = [count * edge for count, edge in zip(grid, patch, strict=True)]
    return split.permute(0, 1 + axes, *order).reshape(len(patches), channels, *size)
