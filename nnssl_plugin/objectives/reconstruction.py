"""Errors of restored images, over the voxels that count."""

import torch
from torch import Tensor


def mean_square(restored: Tensor, image: Tensor, counted: Tensor) -> Tensor:
    """Mean square (B,) of the error over the voxels that count; 0 where none does.

    Args:
        restored: (B, C, *spatial), or broadcastable to it.
        image: (B, C, *spatial).
        counted: (B, C, *spatial) bool.
    """
    error = torch.where(counted, restored - image, 0.0).square()
    return error.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
