"""What can be asked of the tensors of a state dict: their number of parameters, and whether they are finite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some


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
        exact = value.float() if value.element_size() < 2 else value  # isfinite does not know types of 8 bits
        checked[place] = bool(torch.isfinite(exact).all())
        if not checked[place]:
            found.append(key)
    return found


def check_finite(weights: Mapping[str, Tensor], whose: str) -> None:
    """Refuse weights with values that are not finite.

    Args:
        weights: state dict.
        whose: beginning of the message.

    Raises:
        UserError: naming the tensors.
    """
    bad = not_finite(weights)
    if bad:
        raise UserError(
            f"{whose} holds values that are not finite (NaN or infinite) in {len(bad)} of its tensors: {some(bad)}. "
            "The training diverged.",
            "Use an earlier checkpoint of the same run.",
        )
