"""Global and local views of M3Ret's SimDINO (appendix B), made on the device.

Flat images and videos are cropped in the plane, volumes on every axis. A global view is mirrored and its intensities
are shifted; the first is blurred too, the contrast of the second is changed. A local view is a crop alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.methods.m3ret.simdino.settings import Settings
from nnssl_plugin.transforms.crops import Crops, multi_crop
from nnssl_plugin.transforms.intensity import random_blur, random_contrast, random_shift

VOLUME_DEPTH = 0.5
"""Slices of a local view of a volume over those of the volume: 32 of 64."""
LEAST_CELLS = 2
"""Of the coarsest map along an axis that is cropped: a single one could not be normalised."""


def global_views(image: Tensor, settings: Settings, *, video: bool, generator: torch.Generator) -> Tensor:
    """Two views (B, 2, C, *size) of the image's own size."""
    size = tuple(image.shape[2:])
    crops = Crops(2, size, settings.global_side, flip=settings.flip, in_plane=video)
    views, _ = multi_crop(image, crops, spacing=_spacing(image, video), generator=generator)
    views = random_shift(views.flatten(0, 1), settings.shift, generator=generator).unflatten(0, views.shape[:2])
    first, second = views.unbind(1)
    axes = 2 if video else len(size)
    first = random_blur(first, settings.blur, axes=axes, generator=generator)
    second = random_contrast(second, settings.gamma_range, generator=generator)
    return torch.stack((first, second), 1)


def local_views(
    image: Tensor, settings: Settings, strides: Sequence[int], *, video: bool, generator: torch.Generator
) -> Tensor | None:
    """Small views (B, L, C, *size); ``None`` where there are to be none.

    Args:
        image: (B, C, *window).
        settings: :class:`Settings`.
        strides: voxels of a token of the network's coarsest map, per axis.
        video: whether the first axis of the window is time, which is not cropped.
        generator: source of the random numbers, on the device of the image.
    """
    number = settings.local_views
    if image.ndim == 5 and settings.local_views_of_volumes is not None:
        number = settings.local_views_of_volumes
    if number == 0:
        return None
    size = local_size(image.shape[2:], settings.local_size, strides, video=video)
    crops = Crops(number, size, settings.local_side, in_plane=video)
    return multi_crop(image, crops, spacing=_spacing(image, video), generator=generator)[0]


def local_size(window: Sequence[int], share: float, strides: Sequence[int], *, video: bool) -> tuple[int, ...]:
    """Size of a local view in voxels: a share of the window in the plane and half of its slices, to the nearest
    multiple of the network's stride of which two fit, at most the window."""
    shares = [share] * len(window)
    if len(window) == 3:
        shares[0] = 1.0 if video else VOLUME_DEPTH
    return tuple(
        min(length, max(LEAST_CELLS, round(length * part / stride)) * stride)
        for length, part, stride in zip(window, shares, strides[-len(window) :], strict=True)
    )


def _spacing(image: Tensor, video: bool) -> tuple[float, ...]:
    """By which a crop knows the axis that it leaves alone: of a video that of time."""
    return (2.0, 1.0, 1.0) if video else (1.0,) * (image.ndim - 2)
