"""The loss of a pair of copies (BrainMVP, eq. 7 and 8): both are supervised, and their features shall be alike."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.networks.family import reader_of


class PairLoss(nn.Module):
    """In training mode L_sl(X') + L_sl(X'') + λ · mean((F_enc(X') − F_enc(X''))²); in test mode the loss itself.

    Of the norm in equation 7 the mean over samples and features is taken, as its code does, so that λ means the same
    for every network and patch.

    Args:
        loss: ``loss(output, target)`` of one copy, L_sl.
        network: bare, whose deepest features F_enc are seen as they pass.
        weight: λ.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], network: nn.Module, weight: float):
        super().__init__()
        self.loss = loss
        self.weight = weight
        self._features: Tensor | None = None
        self._differences: list[Tensor] = []
        reader_of(network).on_bottleneck(self._see)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss (), of outputs of 2B rows, those of X' first, and a target of B; in test mode B rows of both."""
        if not self.training:
            return self.loss(output, target)
        first, second = self._features.float().chunk(2)
        self._features = None
        difference = (first - second).square().mean()
        self._differences.append(difference.detach())
        supervised = self.loss(half(output, 0), target) + self.loss(half(output, 1), target)
        return supervised + self.weight * difference

    def mean_difference(self) -> float:
        """Mean squared difference of the features over the steps since the last call; NaN without any."""
        taken, self._differences = self._differences, []
        return float(torch.stack(taken).mean()) if taken else float("nan")

    def _see(self, features: Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            self._features = features


def half(output: Any, number: int) -> Any:
    """The first or the second half of the rows of an output: a tensor, or a list or a mapping of them."""
    if isinstance(output, Mapping):
        return {name: half(part, number) for name, part in output.items()}
    if isinstance(output, list | tuple):
        return [half(part, number) for part in output]
    return output.chunk(2)[number]
