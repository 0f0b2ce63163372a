"""Multi-crop: several views of a size of their own from each window (Caron et al. 2020, SwAV, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_plugin.transforms.affine import invert_affine, random_crop
from nnssl_plugin.transforms.along_axes import along, interpolation


@dataclass(frozen=True)
class Crops:
    """Views of one size; a method that has large and small ones draws each kind by itself."""

    number: int
    """Of views K from each window."""
    size: tuple[int, ...]
    """Of each view in voxels, (H, W) or (D, H, W)."""
    side: tuple[float, float]
    """Smallest and largest length of what a view shows, over that of the window (see ``random_crop``)."""
    flip: float = 0.0
    """Probability that an axis is mirrored, for each axis."""
    in_plane: bool | None = None
    """Whether the coarsest axis is not resampled (see ``random_crop``)."""


def multi_crop(
    image: Tensor, crops: Crops, *, spacing: Sequence[float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """K random views of each window.

    Both results have a row per sample, as views must: ``flatten(0, 1)`` makes one batch of them.

    Args:
        image: (B, C, *window).
        crops: number, size and range of the views.
        spacing: of the voxels in mm, one number per axis.
        generator: source of the random numbers, on the device of the image.

    Returns:
        The views (B, K, C, *size) of the image's type, and their affines (B, K, d, d+1) from points of the window to
        points of the view, for ``transform_points``.

    Raises:
        ValueError: as ``random_crop``.
    """
    affines = [
        random_crop(
            len(image),
            image.shape[2:],
            crops.size,
            side=crops.side,
            flip=crops.flip,
            in_plane=crops.in_plane,
            spacing=spacing,
            generator=generator,
            device=image.device,
        )
        for _ in range(crops.number)
    ]
    views = [_shown(image, affine, crops.size) for affine in affines]
    return torch.stack(views, 1), torch.stack(affines, 1)


def _shown(image: Tensor, affine: Tensor, size: Sequence[int]) -> Tensor:
    """What ``warp_image`` shows of a window by an affine that neither rotates nor leaves the window: a linear
    interpolation along each axis by itself."""
    dtype = torch.promote_types(image.dtype, affine.dtype)
    to_window = invert_affine(affine.to(dtype))
    view = image.to(dtype)
    for axis, length in enumerate(size):
        steps = torch.arange(length, device=image.device, dtype=dtype)
        places = steps * to_window[:, axis, axis, None] + to_window[:, axis, -1:]
        view = along(view, interpolation(places, image.shape[2 + axis]), 2 + axis)
    return view.to(image.dtype)
