"""Changes of intensity on the device, drawn anew for each sample, in 2D and 3D: shift, blur, contrast, unit range."""

import math

import torch
from torch import Tensor

from nnssl_plugin.transforms.along_axes import along, convolution

BLUR_REACH = 3
"""Standard deviations of a Gaussian on each side of its middle."""


def to_unit_range(image: Tensor) -> Tensor:
    """Each image (B, C, *spatial) from 0 at its least value to 1 at its greatest; an image of one value becomes 0."""
    low, high = _range(image)
    return (image - low) / torch.where(high > low, high - low, 1)


def random_shift(image: Tensor, largest: float, *, generator: torch.Generator) -> Tensor:
    """Each image brighter or darker by up to ``largest`` of its range, evenly distributed; its range moves along."""
    low, high = _range(image)
    return image + _uniform(image, -largest, largest, generator) * (high - low)


def random_blur(image: Tensor, sigma: tuple[float, float], *, axes: int, generator: torch.Generator) -> Tensor:
    """Each image convolved with a Gaussian, whose deviation in voxels is drawn between two.

    Args:
        image: (B, C, *spatial).
        sigma: least and greatest deviation, 0 or more.
        axes: how many of the last axes are blurred; 2 leaves slices and frames apart.
        generator: source of the random numbers, on the device of the image.
    """
    deviation = _uniform(image, *sigma, generator).reshape(-1, 1)
    reach = max(1, round(BLUR_REACH * sigma[1]))
    offsets = torch.arange(-reach, reach + 1, device=image.device)
    # of no deviation at all only the middle stays
    kernel = torch.exp(-0.5 * (offsets / deviation.clamp(min=1e-3)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(image.dtype)
    for axis in range(image.ndim - axes, image.ndim):
        image = along(image, convolution(kernel, image.shape[axis]), axis)
    return image


def random_contrast(image: Tensor, gamma: tuple[float, float], *, generator: torch.Generator) -> Tensor:
    """Each image with its values, from 0 to 1 over its range, to the power of γ, and brought back to that range.

    Args:
        image: (B, C, *spatial).
        gamma: least and greatest γ, above 0; its logarithm is evenly distributed.
        generator: source of the random numbers, on the device of the image.
    """
    low, high = _range(image)
    exponent = _uniform(image, math.log(gamma[0]), math.log(gamma[1]), generator).exp()
    return to_unit_range(image).pow(exponent) * (high - low) + low


def _range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each image, (B, 1, …)."""
    flat = image.flatten(1)
    shape = (len(image), *[1] * (image.ndim - 1))
    return flat.amin(1).reshape(shape), flat.amax(1).reshape(shape)


def _uniform(image: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """A number (B, 1, …) for each image."""
    drawn = torch.rand(len(image), generator=generator, device=image.device)
    return (low + (high - low) * drawn).reshape(-1, *[1] * (image.ndim - 1)).to(image.dtype)
