"""What a plan's ``finetuning`` block asks for, done to a network: its weights, its optimiser and its schedule."""

from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from nnssl_plugin.checkpoints.adaptation.adapt import MIN_COVERAGE, adapt_weights, check_coverage
from nnssl_plugin.checkpoints.adaptation.report import LoadReport
from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import (
    build_optimizer,
    freeze_the_rest,
    optimisation_for,
    parameter_groups,
)
from nnssl_plugin.finetuning.settings import FinetuningSettings
from nnssl_plugin.networks.family import Parts
from nnssl_plugin.training.schedules import PolySchedule

WARMUP = 0.05
"""Fraction of the epochs that warm up where the plan says nothing: 50 of nnU-Net's 1000."""


def planned_optimisation(
    network: nn.Module, settings: FinetuningSettings, *, epochs: int, parts: Parts | None = None
) -> tuple[Optimizer, PolySchedule]:
    """The optimiser of what the settings let move, and its schedule over the epochs; the rest is frozen.

    Args:
        network: the bare network, or a task's network around it.
        settings: of the plan.
        epochs: of the whole run.
        parts: of a task's network; ``None`` for a bare network.

    Raises:
        UserError: when the settings need parts that the network does not have, or the warm-up does not fit.
    """
    optimisation = optimisation_for(network, settings.optimiser)
    lr = settings.lr or optimisation.lr
    weight_decay = optimisation.weight_decay if settings.weight_decay is None else settings.weight_decay
    alone = settings.decoder_warmup_epochs
    groups = parameter_groups(
        network,
        layer_decay=settings.layer_decay,
        trains=settings.trains,
        frozen_until=alone or settings.frozen_encoder_epochs,
        parts=parts,
    )
    freeze_the_rest(network, groups)
    optimizer = build_optimizer(groups, optimisation, lr=lr, weight_decay=weight_decay)
    warmup = WARMUP * epochs if settings.warmup_epochs is None else settings.warmup_epochs
    return optimizer, PolySchedule(optimizer, lr=lr, total=epochs, warmup=warmup, first_cycle=alone)


def load_planned_weights(network: nn.Module, path: Path, *, plans_name: str) -> LoadReport:
    """Put the plan's weights into the bare network; what pretraining did not train keeps its initialisation.

    Args:
        network: of the plan.
        path: file that ``nnssl_plugin adapt`` wrote.
        plans_name: for messages.

    Returns:
        what became of every tensor.

    Raises:
        UserError: when the file is missing or unreadable, or covers less of the encoder than when it was written.
    """
    if not path.is_file():
        raise UserError(
            f"The weights {path} of plan {plans_name} are not there.",
            "Copy them there, or write them again with nnssl_plugin adapt.",
        )
    content = read_checkpoint(path)
    adaptation = content.get("adaptation", {})
    trained = adaptation.get("loaded", content.get("provenance", {}).get("trained"))
    state, report = adapt_weights(content["network_weights"], network, trained=trained)
    check_coverage(report, minimum=adaptation.get("encoder_coverage", MIN_COVERAGE))
    network.load_state_dict(state)
    return report
