"""The centre rule: where an array that belongs to no case lies on a case, as a modality's template does."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def centre_offset(grid: Sequence[int], case_shape: Sequence[int]) -> tuple[int, ...]:
    """The voxel of an array at which a case begins, when the centre of both is one place; negative where the case is
    the larger one.

    Args:
        grid: size of the array in voxels.
        case_shape: size of the case in voxels, axes in the same order.
    """
    return tuple((of_array - of_case) // 2 for of_array, of_case in zip(grid, case_shape, strict=True))


def cut_placed(values: Tensor, origin: Sequence[int], extent: Sequence[int], case_shape: Sequence[int]) -> Tensor:
    """What of an array lies in a window of a case: a slice of it, with 0 where the array ends.

    Gradients flow to the array's own voxels; all sizes are host-side numbers, so the device is asked nothing.

    Args:
        values: (..., *grid).
        origin: first voxel of the window in the case, negative where it begins before the case.
        extent: size of the window.
        case_shape: size of the case.

    Returns:
        (..., *extent).
    """
    grid = values.shape[-len(extent) :]
    starts = [o + shift for o, shift in zip(origin, centre_offset(grid, case_shape), strict=True)]
    padding: list[int] = []
    for axis, (start, wanted, size) in enumerate(zip(starts, extent, grid, strict=True), start=-len(extent)):
        first, last = (min(max(place, 0), size) for place in (start, start + wanted))
        values = values.narrow(axis, first, last - first)
        before = min(max(-start, 0), wanted)
        padding = [before, wanted - before - (last - first), *padding]
    return functional.pad(values, padding)


def on_case(values: Tensor, case_shape: Sequence[int]) -> Tensor:
    """An array (..., *grid) laid on a whole case: (..., *case_shape), 0 where it does not reach."""
    return cut_placed(values, (0,) * len(case_shape), case_shape, case_shape)


def placed_windows(values: Tensor, number: Tensor, origin: Tensor, case_shape: Tensor, size: Sequence[int]) -> Tensor:
    """For each sample of a batch, what of one of several arrays lies in its window: :func:`cut_placed` on the device.

    The gradient is one array of the size of ``values``, whatever the number of samples.

    Args:
        values: (S, *grid).
        number: (B,) long, which of the S.
        origin: (B, d) whole numbers, first voxel of each window in its case.
        case_shape: (B, d) whole numbers, size of each case.
        size: of a window, in voxels.

    Returns:
        (B, *size), 0 where an array does not reach.
    """
    batch, grid, dims = len(number), values.shape[1:], len(size)
    index = number.reshape(batch, *[1] * dims)
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, (length, wanted) in enumerate(zip(grid, size, strict=True)):
        start = origin[:, axis].long() + (length - case_shape[:, axis].long()).div(2, rounding_mode="floor")
        place = start[:, None] + torch.arange(wanted, device=start.device)
        place = place.reshape(batch, *(wanted if a == axis else 1 for a in range(dims)))
        inside = inside & (place >= 0) & (place < length)
        index = index * length + place.clamp(0, length - 1)
    cut = values.flatten().index_select(0, index.flatten()).unflatten(0, index.shape)
    return torch.where(inside, cut, 0.0)
