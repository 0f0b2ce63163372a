"""Two crops of one window that overlap, and the points of the overlap at which both are read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.networks.token_grid import TokenGrid


def largest_shifts(size: Sequence[int], overlap: float, grid: TokenGrid) -> tuple[int, ...]:
    """How far two crops may lie apart along each axis, in voxels.

    They share ``overlap`` of every side at least, and a stretch between the outermost centres of their tokens, so that
    no point is read beyond what a map holds.

    Args:
        size: of a crop in voxels.
        overlap: in (0, 1].
        grid: tokens of a crop.
    """
    return tuple(
        min(math.floor(length * (1 - overlap) + 1e-9), spacing * (count - 1))
        for length, spacing, count in zip(size, grid.spacing, grid.counts, strict=True)
    )


def draw_starts(
    origin: Tensor,
    case_shape: Tensor,
    *,
    window: Sequence[int],
    size: Sequence[int],
    shifts: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    """First voxels (2, B, d) of two crops in their window: inside the case, or around its middle where it is smaller.

    Args:
        origin: (B, d), voxel of the case at which the window begins.
        case_shape: (B, d) in voxels.
        window, size: of window and crop in voxels.
        shifts: how far the crops may lie apart, per axis.
        generator: source of the random numbers, on the device of ``origin``.
    """
    room = row_of([whole - length for whole, length in zip(window, size, strict=True)], origin)
    low, high = -origin, case_shape - origin - row_of(size, origin)
    middle = ((low + high) / 2).floor()
    low, high = torch.where(high < low, middle, low), torch.where(high < low, middle, high)
    low, high = low.clamp(min=0).minimum(room), high.clamp(min=0).minimum(room)
    first = _whole_between(low, high, generator)
    reach = row_of(shifts, origin)
    second = _whole_between((first - reach).maximum(low), (first + reach).minimum(high), generator)
    return torch.stack((first, second))


def crop_at(volume: Tensor, starts: Tensor, size: Sequence[int]) -> Tensor:
    """A crop (B, C, *size) of each volume (B, C, *window), from its own first voxel (B, d) on."""
    for axis, length in enumerate(size, start=2):
        rows = starts[:, axis - 2, None].long() + torch.arange(length, device=volume.device)
        rows = rows.reshape(len(rows), *[1] * (axis - 1), length, *[1] * (volume.ndim - 1 - axis))
        volume = volume.take_along_dim(rows, axis)
    return volume


def shared_points(starts: Tensor, grid: TokenGrid, number: int) -> Tensor:
    """Lattice over what the outermost token centres of both crops enclose: coordinates (B, d, number) in the window.

    Args:
        starts: (2, B, d), first voxels of the crops.
        grid: tokens of a crop.
        number: of points per axis, in the middles of as many equal parts.
    """
    first = starts + row_of(grid.offset, starts)
    length = row_of([spacing * (count - 1) for spacing, count in zip(grid.spacing, grid.counts, strict=True)], starts)
    low, high = first.amax(0)[..., None], (first + length).amin(0)[..., None]
    parts = (torch.arange(number, device=starts.device, dtype=starts.dtype) + 0.5) / number
    return low + parts * (high - low)


def lattice(axes: Tensor) -> Tensor:
    """The points (B, K^d, d) of coordinates per axis (B, d, K), in the order of a flattened map."""
    number, dimensions = axes.shape[2], axes.shape[1]
    index = torch.cartesian_prod(*[torch.arange(number, device=axes.device)] * dimensions)
    return torch.stack([axes[:, axis, index[:, axis]] for axis in range(dimensions)], -1)


def row_of(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of the type and on the device of another one, without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def _whole_between(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers from ``low`` to ``high``, both included, each as likely."""
    drawn = torch.rand(low.shape, generator=generator, device=low.device)
    return (low + (drawn * (high - low + 1)).floor()).minimum(high)
