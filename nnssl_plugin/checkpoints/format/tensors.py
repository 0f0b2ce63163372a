"""What can be asked of the tensors of a state dict: their number of parameters, and whether they are finite."""

from collections.abc import Mapping

import torch
from torch import Tensor


def parameters_in(weights: Mapping[str, Tensor]) -> int:
    """Floating-point numbers in a state dict; tensors that share their memory count once."""
    places = {(value.data_ptr(), value.shape): value.numel() for value in weights.values() if value.is_floating_point()}
    return sum(places.values())


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors that hold NaN or infinity, in their order; of keys that share their memory the first."""
    checked: dict[tuple, bool] = {}
    found = []
    for key, value in weights.items():
        place = (value.data_ptr(), value.shape, value.dtype)
        if not value.is_floating_point() or place in checked:
            continue
        checked[place] = bool(torch.isfinite(value).all())
        if not checked[place]:
            found.append(key)
    return found
