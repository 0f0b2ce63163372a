"""Parameter groups of fine-tuning with their learning rates, what is frozen, and the optimiser."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import Parts, family_of, parts_of
from nnssl_plugin.training.parameter_groups import Group, stage_scales


@dataclass(frozen=True)
class Optimisation:
    """An optimiser with the numbers that nnU-Net gives it."""

    build: Callable[..., Optimizer]
    lr: float
    weight_decay: float
    gradient_clip: float
    """Largest norm of the gradient."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


CLIPPED_BY_NNUNET = 12
"""Norm to which ``nnUNetTrainer.train_step`` clips every gradient."""
OPTIMISATIONS = {
    # nnUNetTrainer.configure_optimizers
    "sgd": Optimisation(torch.optim.SGD, 1e-2, 3e-5, CLIPPED_BY_NNUNET, {"momentum": 0.99, "nesterov": True}),
    # nnunetv2.training.nnUNetTrainer.primus.primus_trainers.AbstractPrimus
    "adamw": Optimisation(torch.optim.AdamW, 3e-4, 5e-2, 1, {"betas": (0.9, 0.98), "fused": True}),
}


def parameter_groups(
    network: nn.Module,
    *,
    layer_decay: float = 1.0,
    frozen_until: int = 0,
    trains: str = "all",
    parts: Parts | None = None,
) -> list[Group]:
    """Groups for the optimiser: the decoder first (nnU-Net logs the first group's rate), then the encoder's stages.

    Every parameter that ever moves (of those that may: ``requires_grad``) is in one group, those that encoder and
    decoder share in the encoder's. The stem counts to the first stage.

    Args:
        network: the bare network, or a task's network around it.
        layer_decay: factor of the rate from a stage to the next shallower one, in (0, 1].
        frozen_until: first epoch in which the encoder moves.
        trains: ``all``, ``decoder`` (head included) or ``head``.
        parts: of a task's network; ``None`` for those of a bare network of a known family.

    Returns:
        one group where all parameters share a rate; else groups with ``lr_scale`` and ``frozen_until``.

    Raises:
        UserError: for a network whose encoder has no stages.
    """
    if trains == "all" and layer_decay == 1 and not frozen_until:
        return [_group("network", (p for p in network.parameters() if p.requires_grad))]
    parts = parts or parts_of(network)
    if parts is None:
        raise UserError(
            f"{type(network).__name__} has no encoder stages, which layer_decay, the freezing of the "
            "encoder and the linear probe need.",
            "Leave these finetuning settings at their defaults.",
        )
    if trains == "head":
        return [_group("head", parts.head)]
    staged = {id(p) for stage in parts.stages for p in stage}
    decoder = _group(parts.rest_name, (p for p in network.parameters() if p.requires_grad and id(p) not in staged))
    if trains == "decoder":
        return [decoder]
    scales = stage_scales(len(parts.stages), layer_decay)
    return [decoder] + [
        _group(f"{parts.stage_name} {number}", stage, lr_scale=scale, frozen_until=frozen_until)
        for number, (stage, scale) in enumerate(zip(parts.stages, scales, strict=True))
    ]


def freeze_the_rest(network: nn.Module, groups: Sequence[Group]) -> None:
    """Switch the gradient off for what is in no group; to be called before the network is wrapped for several ranks."""
    moving = {id(p) for group in groups for p in group["params"]}
    for parameter in network.parameters():
        if id(parameter) not in moving:
            parameter.requires_grad_(False)


def rest_at_test_mode(network: nn.Module) -> None:
    """Put modules without any moving parameter into test mode: no dropout and no stochastic depth before a probe."""
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def optimisation_for(network: nn.Module, chosen: str | None) -> Optimisation:
    """The chosen optimiser, or that of nnU-Net's own trainer for networks of this family; SGD for unknown ones."""
    family = family_of(network)
    return OPTIMISATIONS[chosen or (family.optimiser if family else "sgd")]


def build_optimizer(
    groups: Sequence[Group], optimisation: Optimisation, *, lr: float, weight_decay: float
) -> Optimizer:
    """The optimiser with its hooks: frozen groups rest, and the gradient is clipped where nnU-Net's clip is wider."""
    optimizer = optimisation.build(groups, lr=lr, weight_decay=weight_decay, **optimisation.arguments)
    optimizer.register_step_pre_hook(skip_frozen)
    if optimisation.gradient_clip < CLIPPED_BY_NNUNET:
        optimizer.register_step_pre_hook(_clipping_to(optimisation.gradient_clip))
    return optimizer


def skip_frozen(optimizer: Optimizer, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a step: drop the gradients of groups whose rate is 0, so that they gather no momentum either.

    Frozen parameters keep their ``requires_grad``, as ranks and compiled networks fix it when they are wrapped; their
    gradients still count in the norm that nnU-Net clips.
    """
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def _clipping_to(norm: float) -> Callable[..., None]:
    def clip(optimizer: Optimizer, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)

    return clip


def _group(name: str, parameters: Iterable[nn.Parameter], *, lr_scale: float = 1.0, frozen_until: int = 0) -> Group:
    return {"params": list(parameters), "name": name, "lr_scale": lr_scale, "frozen_until": frozen_until}
