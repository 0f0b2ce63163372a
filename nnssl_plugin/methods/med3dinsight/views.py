"""What the encoder sees of a volume."""

import torch
from torch import Tensor

from nnssl_plugin.methods.med3dinsight.settings import Settings
from nnssl_plugin.transforms.masks import fill_masked, random_block_mask


def corrupt(image: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """The volume that the encoder sees: blocks set to 0 (``corruption="mask"``), or the volume itself (``"none"``).

    Section III-D.2 speaks of "image restoration" and names no corruption; of a clean volume, a decoder with skip
    connections would restore everything by copying it.

    Args:
        image: (B, C, *spatial), the plan's normalised intensities; all channels of a sample lose the same blocks.
        settings: corruption, mask_ratio and mask_block.
        generator: source of the random numbers, on the device of the image.

    Returns:
        (B, C, *spatial).
    """
    if settings.corruption == "none":
        return image
    mask = random_block_mask(
        len(image),
        image.shape[2:],
        block=settings.mask_block,
        ratio=settings.mask_ratio,
        generator=generator,
        device=image.device,
    )
    return fill_masked(image, mask, 0.0)
