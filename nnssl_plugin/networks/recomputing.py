"""Activation checkpointing: parts of a network forget their activations and compute them again in the backward pass."""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import RecomputedReader, known_family_of


class Recomputed:
    """In front of a module's class: keeps the inputs alone, with the state of the random numbers for dropout."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the module gives."""
        forward = super().forward  # type: ignore[misc]  # of the module
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)


def recompute_activations(network: nn.Module) -> None:
    """Make the stages or blocks of a bare network recompute their activations, in place; keys and results stay.

    Args:
        network: of a family whose reader names the parts (``RecomputedReader``).

    Raises:
        UserError: for any other network.
    """
    family = known_family_of(network)
    reader = family.reader(network)
    if not isinstance(reader, RecomputedReader):
        raise UserError(
            f"{type(network).__name__} has no parts that are known to recompute their activations.",
            "Leave the setting recompute out, or lower the batch size or the patch.",
        )
    for part in reader.recomputed():
        if not isinstance(part, Recomputed):
            part.__class__ = _recomputing(type(part))


@cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module, recomputing: a copy of the module, such as a teacher, is of it too."""
    return type(f"Recomputed{kind.__name__}", (Recomputed, kind), {})
