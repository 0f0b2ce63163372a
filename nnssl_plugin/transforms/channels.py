"""Channels of a batch: one of each sample, chosen or drawn among those that its case has."""

import torch
from torch import Tensor


def channel_of(image: Tensor, channel: Tensor) -> Tensor:
    """One channel of each sample: (B, C, *spatial), (B,) long → (B, 1, *spatial)."""
    index = channel.reshape(-1, *[1] * (image.ndim - 1)).expand(-1, 1, *image.shape[2:])
    return image.gather(1, index)


def drawn_channel(image: Tensor, available: Tensor, *, generator: torch.Generator) -> Tensor:
    """A channel of each sample (B, 1, *spatial), drawn evenly among those that its case has.

    Args:
        image: (B, C, *spatial).
        available: (B, C) bool, at least one of each case.
        generator: source of the random numbers, on the device of the image.
    """
    scores = torch.rand(available.shape, generator=generator, device=image.device)
    return channel_of(image, torch.where(available, scores, -1.0).argmax(1))
