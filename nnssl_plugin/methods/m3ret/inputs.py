"""Images, videos and volumes as inputs of one network (section 3.1): channels, frames, slices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.data.batch import Batch
from nnssl_plugin.methods.m3ret.settings import InputSettings
from nnssl_plugin.transforms.channels import drawn_channel
from nnssl_plugin.transforms.intensity import to_unit_range

VIDEO = "video"
"""Kind of a source whose slices are frames."""
COLOURS = 3
"""Channels of the paper's network."""


def image_channels(settings: InputSettings, *, several: bool) -> int | None:
    """Channels that every image gets; ``None`` where the network reads those of its one dataset as they are.

    Args:
        settings: :class:`InputSettings`.
        several: whether the plan names sources, whose images may differ in their channels.
    """
    if settings.channels is None and not several:
        return None
    return settings.channels or COLOURS


def unified(batch: Batch, settings: InputSettings, channels: int | None, generator: torch.Generator) -> Tensor:
    """The batch's images (B, channels, *window); of a video, some of its frames. Slices of a flat image come later, in
    :func:`as_volume`, as its views are cut in the plane.

    Args:
        batch: the step's.
        settings: :class:`InputSettings`.
        channels: that every image is to have; ``None`` where the network reads those of the one dataset.
        generator: source of the random numbers, on the device of the images.
    """
    image, kind = batch["image"], batch.get("kind", "")
    if channels is not None:
        image = with_channels(image, batch["available"], channels, colour=kind in settings.colour, generator=generator)
    if kind == VIDEO:
        image = some_frames(image, settings.frames, generator=generator)
    return to_unit_range(image) if settings.intensity == "unit" else image


def with_channels(
    image: Tensor, available: Tensor, channels: int, *, colour: bool, generator: torch.Generator
) -> Tensor:
    """The image with another number of channels, all alike: of several channels of its own, one that the case has.

    Args:
        image: (B, C, *window).
        available: (B, C) bool, the channels that each case has.
        channels: that the network reads.
        colour: whether the image's channels are colours; as many as the network reads then stay as they are.
        generator: source of the random numbers, on the device of the image.
    """
    own = image.shape[1]
    if own == channels and (colour or own == 1):
        return image
    return drawn_channel(image, available, generator=generator).expand(-1, channels, *image.shape[2:])


def some_frames(video: Tensor, number: int, *, generator: torch.Generator) -> Tensor:
    """``number`` different frames of each video (B, C, T, H, W), in their order; all of them where it has no more."""
    frames = video.shape[2]
    if frames <= number:
        return video
    key = torch.rand(len(video), frames, generator=generator, device=video.device)
    chosen = key.argsort(1)[:, :number].sort(1).values
    index = chosen[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:])
    return video.gather(2, index)


def as_volume(image: Tensor, patch: Sequence[int]) -> Tensor:
    """A flat image (B, C, H, W) repeated along a new axis to the thickness of one patch, for a network of volumes;
    everything else as it is."""
    if image.ndim - 2 == len(patch):
        return image
    return image[:, :, None].expand(-1, -1, patch[0], -1, -1)
