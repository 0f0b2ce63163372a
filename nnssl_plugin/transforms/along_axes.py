"""Linear maps of images along one axis at a time, a matrix for each sample: on a CPU such products take a fraction of
the time of grouped convolutions and of interpolation at points."""

import torch
from torch import Tensor


def along(image: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Each image (B, C, *spatial) multiplied along one spatial axis by its own matrix (B, to, from).

    A NaN spreads along the whole axis.
    """
    rows = image.flatten(1, axis - 1)  # (B, others, from, *rest)
    mapped = rows @ matrix.mT if axis == image.ndim - 1 else matrix[:, None] @ rows.flatten(3)
    return mapped.reshape(*image.shape[:axis], matrix.shape[1], *image.shape[axis + 1 :])


def convolution(kernel: Tensor, length: int) -> Tensor:
    """The matrices (B, length, length) of convolutions with kernels (B, K) of odd K; beyond the border its last value
    goes on."""
    places = torch.arange(length, device=kernel.device)
    offsets = torch.arange(kernel.shape[1], device=kernel.device) - kernel.shape[1] // 2
    sources = (places[:, None] + offsets).clamp(0, length - 1)
    taken = (sources[..., None] == places).to(kernel.dtype)  # (to, K, from)
    return torch.einsum("bk,tkf->btf", kernel, taken)


def interpolation(places: Tensor, length: int) -> Tensor:
    """The matrices (B, to, length) that interpolate linearly at places (B, to) in voxels; beyond the border its last
    value goes on."""
    voxels = torch.arange(length, device=places.device, dtype=places.dtype)
    return (1 - (places.clamp(0, length - 1)[..., None] - voxels).abs()).clamp(min=0)
