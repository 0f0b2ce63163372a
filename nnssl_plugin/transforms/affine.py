"""Affine views: one transformation for the image and for the points in it, made on the device, in 2D and 3D.

Affines are tensors (B, d, d+1) float32 that map a point of the window to the point of the view that shows it. Points
are in voxels, in the order of the image's axes; voxel centres are the whole numbers 0 … n − 1, and voxel i covers
[i − ½, i + ½]. Nothing here waits for the device, and no matrix product is used, which autocast or TF32 would round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

ANISOTROPY = 3
"""An axis this many times coarser than the others is not mixed with them (nnU-Net's ``ANISO_THRESHOLD``)."""


@dataclass(frozen=True)
class AffineRange:
    """What :func:`random_affine` draws from, uniformly; the defaults leave everything as it is."""

    rotation: float = 0.0
    """Largest angle in degrees, either way, in each plane of two axes (three angles in 3D)."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification, the same for all axes; above 1 the view shows structures larger."""
    translation: float = 0.0
    """Largest shift of each axis, either way, as a fraction of the window."""
    flip: float = 0.0
    """Probability that an axis is mirrored, for each axis."""
    in_plane: bool | None = None
    """Rotate, scale and shift only within the planes normal to the coarsest axis, which needs no interpolation
    between slices; ``None`` does so where that axis is more than three times coarser than the others, or the window
    less than a third as many voxels long. Flips stay on all axes."""

    def __post_init__(self) -> None:
        low, high = self.scale
        fine = {
            "rotation": self.rotation >= 0,
            "scale": 0 < low <= high,
            "translation": self.translation >= 0,
            "flip": 0 <= self.flip <= 1,
        }
        wrong = next((name for name, ok in fine.items() if not ok), None)
        if wrong is not None:
            raise ValueError(f"{wrong} cannot be {getattr(self, wrong)!r}")


def random_affine(
    batch: int,
    size: Sequence[int],
    ranges: AffineRange,
    *,
    spacing: Sequence[float],
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Affines about the centre of the window, drawn anew for each sample: flip, scale, rotate, shift.

    Rotation and scale are applied in mm, so that a rotation keeps lengths and angles in mm for any spacing.

    Args:
        batch: number of samples B.
        size: of the window in voxels, (H, W) or (D, H, W).
        ranges: what is drawn.
        spacing: of the voxels in mm, one number per axis.
        generator: source of the random numbers, on ``device``.
        device: where the affines are made.

    Returns:
        (B, d, d+1) float32, from points of the window to points of the view.

    Raises:
        ValueError: for a spacing with another number of axes than the window.
    """
    if len(spacing) != len(size):
        raise ValueError(f"spacing {tuple(spacing)} does not fit a window of size {tuple(size)}")
    axes = range(len(size))
    moving = _moving_axes(size, spacing, ranges.in_plane)
    planes = list(combinations(moving, 2))
    low, high = ranges.scale

    angle = _symmetric(batch, len(planes), generator, device) * math.radians(ranges.rotation)
    scale = low + (high - low) * torch.rand(batch, 1, generator=generator, device=device)
    shift = _symmetric(batch, len(size), generator, device) * ranges.translation
    flipped = torch.rand(batch, len(size), generator=generator, device=device) < ranges.flip

    moves = _to(device, [float(axis in moving) for axis in axes])
    linear = torch.diag_embed(torch.where(moves > 0, scale, 1.0) * torch.where(flipped, -1.0, 1.0))
    for number, plane in enumerate(planes):
        linear = _product(_rotation(angle[:, number], plane, len(size)), linear)
    linear = linear * _to(device, [[spacing[j] / spacing[i] for j in axes] for i in axes])
    centre = _to(device, [(length - 1) / 2 for length in size])
    shift = shift * moves * _to(device, list(size))
    offset = centre + shift - _product(linear, centre[:, None])[..., 0]
    return torch.cat((linear, offset[..., None]), -1)


def random_crop(
    batch: int,
    window: Sequence[int],
    size: Sequence[int],
    *,
    side: tuple[float, float],
    flip: float = 0.0,
    in_plane: bool | None = None,
    spacing: Sequence[float],
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Affines from a window to views of another size that show a random box of it, drawn anew for each sample.

    The box has one share of the window's length on all axes, and lies inside the window, everywhere equally likely.
    ``warp_image(window, affine, size=size)`` shows it; ``compose`` adds a rotation within it.

    Args:
        batch: number of samples B.
        window: its size in voxels, (H, W) or (D, H, W).
        size: of the views in voxels; its proportions are best those of the window, or the views are stretched.
        side: smallest and largest length of the box over that of the window, in (0, 1]. Papers that state an area a
            mean the side √a in 2D.
        flip: probability that an axis is mirrored, for each axis.
        in_plane: whether the coarsest axis is not resampled, as in :class:`AffineRange`: the box then has as many
            slices as the view, whichever they are.
        spacing: of the voxels in mm, one number per axis.
        generator: source of the random numbers, on ``device``.
        device: where the affines are made.

    Returns:
        (B, d, d+1) float32, from points of the window to points of the view.

    Raises:
        ValueError: for sizes and a spacing of different dimension, a share outside (0, 1], or a view with more slices
            than the window along an axis that is not resampled.
    """
    scaled = _resampled_axes(window, size, side, spacing, in_plane)
    low, high = side
    share = low + (high - low) * torch.rand(batch, 1, generator=generator, device=device)
    place = torch.rand(batch, len(window), generator=generator, device=device)
    flipped = torch.rand(batch, len(window), generator=generator, device=device) < flip

    length, target = _to(device, list(window)), _to(device, list(size))
    resampled = _to(device, [float(axis in scaled) for axis in range(len(window))]) > 0
    box = torch.where(resampled, share * length, target)
    free = length - box
    whole = torch.minimum((place * (free + 1)).floor(), free)
    start = torch.where(resampled, place * free, whole)  # the box's first face, from that of the window
    scale = target / box
    offset = (0.5 - start) * scale - 0.5
    linear = torch.diag_embed(torch.where(flipped, -scale, scale))
    offset = torch.where(flipped, target - 1 - offset, offset)
    return torch.cat((linear, offset[..., None]), -1)


def transform_points(points: Tensor, affine: Tensor) -> Tensor:
    """Where the points of the window lie in the view.

    Args:
        points: (B, N, d) or, the same for all samples, (N, d); in voxels.
        affine: (B, d, d+1).

    Returns:
        (B, N, d), in voxels of the view.
    """
    linear, offset = affine[..., :-1], affine[..., -1]
    return (points[..., None, :] * linear[:, None]).sum(-1) + offset[:, None]


def invert_affine(affine: Tensor) -> Tensor:
    """The affines (B, d, d+1) from points of the view back to points of the window."""
    linear = torch.linalg.inv_ex(affine[..., :-1]).inverse  # unlike inv, it does not wait to look for singular ones
    return torch.cat((linear, -_product(linear, affine[..., -1:])), -1)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The affines (B, d, d+1) that do ``inner`` first and ``outer`` on its result."""
    linear = outer[..., :-1]
    offset = _product(linear, inner[..., -1:]) + outer[..., -1:]
    return torch.cat((_product(linear, inner[..., :-1]), offset), -1)


def warp_image(image: Tensor, affine: Tensor, *, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The view of a window: each of its voxels shows the point of the window that the affine maps there.

    Linear interpolation, in float32 at least. A voxel of the view is valid if its point lies within the window's
    voxels, border included; the others are exactly 0. Values do not fade towards the border: the outer half of the
    outermost voxels has their value. A NaN spreads to the valid voxels that are interpolated from it, not further.
    Nothing is smoothed: a view that shows structures at less than half their size passes over voxels.

    Args:
        image: (B, C, *window).
        affine: (B, d, d+1), from points of the window to points of the view.
        size: of the view in voxels; ``None`` for that of the window.

    Returns:
        The view (B, C, *size) of the image's type, and (B, 1, *size) bool, True = shows the window.
    """
    window = image.shape[2:]
    size = window if size is None else tuple(size)
    dtype = torch.promote_types(image.dtype, affine.dtype)
    to_window = invert_affine(affine.to(dtype))
    valid, grid = None, []
    for axis, length in enumerate(window):
        position = _position(to_window[:, axis], size)
        inside = (position >= -0.5) & (position <= length - 0.5)
        valid = inside if valid is None else valid & inside
        grid.append((2 * position + 1) / length - 1)  # -1 and 1 are the outer faces of the outermost voxels
    points = torch.stack(grid[::-1], -1)  # grid_sample counts axes from the last
    view = F.grid_sample(image.to(dtype), points, mode="bilinear", padding_mode="border", align_corners=False)
    valid = valid[:, None]
    return torch.where(valid, view, 0.0).to(image.dtype), valid


def _moving_axes(size: Sequence[int], spacing: Sequence[float], in_plane: bool | None) -> tuple[int, ...]:
    """The axes that are rotated, scaled and shifted."""
    axes = tuple(range(len(size)))
    if len(axes) == 2:
        return axes
    coarsest = max(axes, key=lambda axis: (spacing[axis], -size[axis]))
    others = tuple(axis for axis in axes if axis != coarsest)
    if in_plane is None:
        coarse = spacing[coarsest] > ANISOTROPY * max(spacing[axis] for axis in others)
        short = ANISOTROPY * size[coarsest] < min(size[axis] for axis in others)
        in_plane = coarse or short
    return others if in_plane else axes


def _resampled_axes(
    window: Sequence[int],
    size: Sequence[int],
    side: tuple[float, float],
    spacing: Sequence[float],
    in_plane: bool | None,
) -> tuple[int, ...]:
    """The axes along which a crop's length is drawn; refuses crops that cannot be made."""
    if not len(window) == len(size) == len(spacing):
        raise ValueError(
            f"a view of size {tuple(size)}, a window of {tuple(window)} and a spacing of {tuple(spacing)} do not fit"
        )
    if not 0 < side[0] <= side[1] <= 1:
        raise ValueError(f"side cannot be {side}")
    scaled = _moving_axes(window, spacing, in_plane)
    if any(size[axis] > window[axis] for axis in range(len(window)) if axis not in scaled):
        raise ValueError(f"a view of size {tuple(size)} has more slices than the window of {tuple(window)}")
    return scaled


def _rotation(angle: Tensor, plane: tuple[int, int], dims: int) -> Tensor:
    """Rotations (B, d, d) by ``angle`` (B,) in radians that turn the first axis of the plane towards the second."""
    first, second = plane
    matrix = torch.eye(dims, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angle.cos()
    matrix[:, second, first] = angle.sin()
    matrix[:, first, second] = -angle.sin()
    return matrix


def _position(row: Tensor, size: Sequence[int]) -> Tensor:
    """One coordinate (B, *size) of the points that an affine's ``row`` (B, d+1) gives the voxels of an image."""
    axes = [1] * len(size)
    position = row[:, -1].view(-1, *axes)
    for axis, length in enumerate(size):
        along = row[:, axis, None] * torch.arange(length, device=row.device)
        position = position + along.view(-1, *axes[:axis], length, *axes[axis + 1 :])
    return position


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix product (..., n, k) · (..., k, m) of small matrices in full precision."""
    return (first[..., :, :, None] * second[..., None, :, :]).sum(-2)


def _symmetric(batch: int, number: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """(batch, number) uniform in [-1, 1]."""
    return 2 * torch.rand(batch, number, generator=generator, device=device) - 1


def _to(device: torch.device | str, values: list) -> Tensor:
    """A small constant on the device, without waiting for it."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
