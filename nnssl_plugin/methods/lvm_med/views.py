"""Two views of each image, and where they lie in it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.methods.lvm_med.settings import Settings
from nnssl_plugin.transforms.affine import compose, invert_affine, random_crop, transform_points, warp_image
from nnssl_plugin.transforms.channels import drawn_channel
from nnssl_plugin.transforms.intensity import random_blur, random_contrast, random_shift


def with_channels(image: Tensor, available: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """The image with as many channels as the network reads.

    Args:
        image: (B, C, *spatial).
        available: (B, C) bool, the channels that each case really has.
        channels: of the network.
        generator: source of the random numbers, on the device of the image.

    Returns:
        (B, channels, *spatial): the image itself, or one of its available channels, drawn at random, in all channels.
    """
    if image.shape[1] == channels:
        return image
    return drawn_channel(image, available, generator=generator).expand(-1, channels, *image.shape[2:])


def image_boxes(image: Tensor, settings: Settings, *, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    """The part of each window that both its views are cut from: affines (B, d, d+1) from window to part."""
    window = tuple(image.shape[2:])
    side = _sides(settings.image_share)
    drawn = {"side": side, "spacing": spacing, "generator": generator, "device": image.device}
    return random_crop(len(image), window, window, **drawn)


def random_view(
    image: Tensor,
    boxes: Tensor,
    size: Sequence[int],
    settings: Settings,
    *,
    spacing: Sequence[float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """s(x) or t(x): a random crop, mirrored or not, with other brightness, contrast and sharpness (section 4.1).

    Args:
        image: (B, C, *window).
        boxes: (B, d, d+1), what :func:`image_boxes` gave.
        size: of the view in voxels.
        settings: the fields of the views.
        spacing: voxel size in mm per axis.
        generator: source of the random numbers, on the device of the image.

    Returns:
        The view (B, C, *size), 0 where the image is exactly 0 (padding), and its affine (B, d, d+1) from points of the
        window, in voxels.
    """
    crop = random_crop(
        len(image),
        image.shape[2:],
        size,
        side=_sides(settings.view_share),
        flip=settings.flip,
        spacing=spacing,
        generator=generator,
        device=image.device,
    )
    affine = compose(crop, boxes)
    view, _ = warp_image(image, affine, size=size)
    return torch.where(view.ne(0), _varied(view, settings, generator), 0.0), affine


def places_in_image(centres: Tensor, affine: Tensor, window: Sequence[int]) -> Tensor:
    """Where the cells of a view lie in the window it was cut from: (B, P, d), 0 to 1 along each axis.

    Shares of the axes, so that cells of two images can be compared (Eq. 2 asks for m(p) of all pairs of images).

    Args:
        centres: of the cells in the view (P, d), in voxels.
        affine: (B, d, d+1), from points of the window to points of the view.
        window: its size in voxels.
    """
    whole = torch.tensor(window, dtype=affine.dtype).to(affine.device, non_blocking=True)
    return (transform_points(centres, invert_affine(affine)) + 0.5) / whole


def _varied(view: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Brightness and contrast of each channel, then sharpness, each for some of the views."""

    def where(probability: float, changed: Tensor) -> Tensor:
        drawn = torch.rand(len(view), *[1] * (view.ndim - 1), generator=generator, device=view.device)
        return torch.where(drawn < probability, changed, view)

    apart = view.flatten(0, 1)[:, None]  # each channel by itself
    apart = random_shift(apart, settings.shift, generator=generator)
    apart = random_contrast(apart, settings.gamma, generator=generator)
    view = where(settings.jitter_probability, apart[:, 0].unflatten(0, view.shape[:2]))
    return where(settings.blur_probability, random_blur(view, settings.blur, axes=view.ndim - 2, generator=generator))


def _sides(areas: tuple[float, float]) -> tuple[float, float]:
    """Lengths of squares of some areas."""
    return math.sqrt(areas[0]), math.sqrt(areas[1])
