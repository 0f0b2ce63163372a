"""The optimiser of a pretraining and what moves its numbers, from the settings of the plan."""

import torch
from torch.optim import SGD, AdamW, Optimizer

from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.training.parameter_groups import Group, scaled_by_stage
from nnssl_plugin.training.schedules import (
    CosineSchedule,
    HalvingSchedule,
    PolySchedule,
    Schedules,
    WeightDecaySchedule,
)

SCHEDULES = {"cosine": CosineSchedule, "halving": HalvingSchedule, "poly": PolySchedule}


def optimisation_of(task: PretextTask, settings: TrainingSettings, *, total: int) -> tuple[Optimizer, Schedules]:
    """Optimiser and schedules of a run of ``total`` steps.

    The optimisers are fused: their kernels skip a step on the device where ``found_inf`` is set.

    Raises:
        UserError: when the warm-up leaves nothing of the run.
    """
    groups = scaled_by_stage(task.parameter_groups(), task.backbone.parts(), settings.layer_decay)
    with_own_decay = {number for number, group in enumerate(groups) if "weight_decay" in group}
    optimizer = _sgd(groups, settings) if settings.optimiser == "sgd" else _adamw(groups, settings)
    warmup = settings.warmup_epochs * settings.iterations_per_epoch
    rates = SCHEDULES[settings.schedule](optimizer, lr=settings.lr, total=total, warmup=warmup)
    if settings.weight_decay_end is None:
        return optimizer, Schedules(rates)
    start, end = settings.weight_decay, settings.weight_decay_end
    decay = WeightDecaySchedule(optimizer, start=start, end=end, total=total, spared=with_own_decay)
    return optimizer, Schedules(rates, decay)


def _adamw(groups: list[Group], settings: TrainingSettings) -> AdamW:
    return AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)


def _sgd(groups: list[Group], settings: TrainingSettings) -> SGD:
    """SGD with Nesterov's momentum, as nnU-Net and nnssl train; its weight decay goes through the gradient.

    The first step of PyTorch's fused SGD takes the memory of its momentum uninitialised, and where that step is skipped
    the second one reads it. From zeros a first step is the same.
    """
    optimizer = SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    if settings.momentum > 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
