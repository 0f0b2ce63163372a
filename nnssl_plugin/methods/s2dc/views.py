"""Views of student and teacher: the window, and a copy of it that was moved and whose intensities were changed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.methods.s2dc.settings import Settings
from nnssl_plugin.pretraining.pretext import Views
from nnssl_plugin.transforms.affine import AffineRange, random_affine, warp_image


def second_view(image: Tensor, settings: Settings, *, spacing: Sequence[float], generator: torch.Generator) -> Views:
    """V' of the whole window V: one random affine, then a change of intensities.

    Args:
        image: V, (B, C, *window).
        settings: rotation, scale, translation, flip, in_plane and the intensity fields.
        spacing: voxel size in mm per axis, so that a rotation is one in the body.
        generator: source of the random numbers, on the device of the image.

    Returns:
        ``warped`` (B, C, *window), 0 outside the window; ``valid`` (B, 1, *window) bool, where it shows the window;
        ``affine`` H (B, d, d+1), from points of V to points of V', in voxels.
    """
    ranges = AffineRange(
        rotation=settings.rotation,
        scale=settings.scale,
        translation=settings.translation,
        flip=settings.flip,
        in_plane=settings.in_plane,
    )
    affine = random_affine(
        len(image), image.shape[2:], ranges, spacing=spacing, generator=generator, device=image.device
    )
    warped, valid = warp_image(image, affine)
    return {"warped": vary_intensity(warped, settings, generator), "valid": valid, "affine": affine}


def augmented_copy(
    image: Tensor, grid: Sequence[int], settings: Settings, *, spacing: Sequence[float], generator: torch.Generator
) -> Views:
    """v'_i of section 3.1: one sub-volume of each window, chosen at random, with a small affine of its own.

    Under the affine of the whole window, a sub-volume at its border would show something else than its own copy.

    Args:
        image: V, (B, C, *window).
        grid: sub-volumes per axis.
        settings: copy_rotation, copy_scale, copy_translation, flip, in_plane and the intensity fields.
        spacing: voxel size in mm per axis.
        generator: source of the random numbers, on the device of the image.

    Returns:
        ``copy`` (B, C, *sub-volume), and ``chosen`` (B,) int64, the index of the sub-volume.
    """
    parts = cut(image, grid)
    batch = len(image)
    chosen = torch.randint(parts.shape[1], (batch,), generator=generator, device=image.device)
    part = parts[torch.arange(batch, device=image.device), chosen]
    ranges = AffineRange(
        rotation=settings.copy_rotation,
        scale=settings.copy_scale,
        translation=settings.copy_translation,
        flip=settings.flip,
        in_plane=settings.in_plane,
    )
    affine = random_affine(batch, part.shape[2:], ranges, spacing=spacing, generator=generator, device=image.device)
    return {"copy": vary_intensity(warp_image(part, affine)[0], settings, generator), "chosen": chosen}


def vary_intensity(image: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Contrast, shift and noise, each drawn for every sample and channel, in the channel's own standard deviations.

    They are relative, so that they mean the same in a plan of z-scores, of windowed CT and of PET uptake. What is
    exactly 0 (padding, channels that a case lacks) stays 0.

    Args:
        image: (B, C, *spatial).
        settings: the intensity fields.
        generator: source of the random numbers, on the device of the image.

    Returns:
        (B, C, *spatial).
    """
    shown = image.ne(0)
    axes = tuple(range(2, image.ndim))
    count = shown.sum(axes, keepdim=True).clamp(min=1)
    mean = image.sum(axes, keepdim=True) / count
    spread = (torch.where(shown, image - mean, 0.0).square().sum(axes, keepdim=True) / count).sqrt()

    def drawn(largest: float) -> Tensor:
        """In [-largest, largest], or 0 where the change is not made."""
        value, made = torch.rand((2, *mean.shape), generator=generator, device=image.device)
        return torch.where(made < settings.intensity_probability, largest * (2 * value - 1), 0.0)

    contrast, shift = 1 + drawn(settings.intensity_scale), drawn(settings.intensity_shift)
    noise = torch.randn(image.shape, generator=generator, device=image.device) * drawn(settings.intensity_noise)
    return torch.where(shown, mean + (image - mean) * contrast + (shift + noise) * spread, 0.0)


def cut(block: Tensor, grid: Sequence[int]) -> Tensor:
    """Sub-volumes (B, K, C, *spatial / grid) of a block (B, C, *spatial); ``join`` reverses it."""
    parts = block[:, None]
    for axis, number in enumerate(grid, start=3):
        parts = torch.cat(parts.chunk(number, axis), 1)
    return parts


def join(parts: Tensor, grid: Sequence[int]) -> Tensor:
    """The block (B, C, *spatial · grid) of sub-volumes (B, K, C, *spatial) that ``cut`` gave."""
    for axis in reversed(range(len(grid))):
        parts = torch.cat(parts.chunk(grid[axis], 1), axis + 3)
    return parts[:, 0]
