"""What a plan's ``finetuning`` block asks for, done to a network: its weights, its optimiser and its schedule."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nnssl_plugin.checkpoints.adaptation.adapt import HEAD, MIN_COVERAGE, check_coverage, shared_tensors
from nnssl_plugin.checkpoints.adaptation.correspondence import Layout
from nnssl_plugin.checkpoints.adaptation.report import LoadReport, TensorRecord
from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.format.tensors import check_finite
from nnssl_plugin.checkpoints.sources.state_dicts import is_state_dict
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
FRESH = "not in the adapted weights"
"""Why a tensor keeps its initialisation; the report beside the weights says more."""


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
    """Put the weights that ``adapt`` wrote for a plan into its network: every key and shape must be as written.

    What did not come from the pretraining (segmentation layers, what it did not train) keeps its initialisation.

    Args:
        network: of the plan, bare.
        path: file that ``nnssl_plugin adapt`` wrote.
        plans_name: for messages.

    Returns:
        what became of every tensor.

    Raises:
        UserError: when the file is missing or unreadable, does not fit the network exactly, covers less of the
            encoder than when it was written, or holds values that are not finite.
    """
    if not path.is_file():
        raise UserError(
            f"The weights {path} of plan {plans_name} are not there.",
            "Copy them there, or write them again with nnssl_plugin adapt.",
        )
    content = read_checkpoint(path)
    weights = content.get("network_weights")
    if not is_state_dict(weights):
        raise UserError(f"{path} holds no network_weights.", "Write it again with nnssl_plugin adapt.")
    _check_exact(weights, network.state_dict(), path, plans_name)
    report = _as_written(network, _comes_from_pretraining(content))
    check_coverage(report, minimum=content.get("adaptation", {}).get("encoder_coverage", MIN_COVERAGE))
    loaded = {key: weights[key] for record in report.tensors if record.status == "copied" for key in record.keys}
    check_finite(loaded, str(path))
    network.load_state_dict(network.state_dict() | loaded)
    return report


def _check_exact(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, plans_name: str) -> None:
    written, here = ({key: tuple(value.shape) for key, value in state.items()} for state in (weights, expected))
    different = [key for key in {**here, **written} if written.get(key) != here.get(key)]
    if different:
        key = different[0]
        raise UserError(
            f"The weights {path} were not written for the network of plan {plans_name}: {len(different)} tensors "
            f"differ, such as {key} ({_shape(written.get(key))} in the file, {_shape(here.get(key))} here).",
            f"Write them for this plan: nnssl_plugin adapt -d ID -w CHECKPOINT -p {plans_name} -n NAME",
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape)) or "a number"


def _comes_from_pretraining(content: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether the values under a key came from the pretraining, by what ``adapt`` wrote, else by the provenance."""
    loaded, provenance = content.get("adaptation", {}).get("loaded"), content.get("provenance") or {}
    if loaded is not None:
        return frozenset(loaded).__contains__
    trained = provenance.get("trained")
    return lambda key: trained is None or key.startswith(tuple(trained))


def _as_written(network: nn.Module, comes_from_pretraining: Callable[[str], bool]) -> LoadReport:
    """Which tensors are taken as they are, and which keep their initialisation."""
    layout, learned = Layout(network), {id(parameter) for parameter in network.parameters()}
    records = []
    for keys, tensor in shared_tensors(network):
        part, size = layout.part(keys), tensor.numel() if id(tensor) in learned else 0
        taken = part != "head" and any(map(comes_from_pretraining, keys))
        records.append(
            TensorRecord(
                keys=keys,
                part=part,
                status="copied" if taken else "initialised",
                reason="" if taken else HEAD if part == "head" else FRESH,
                shape=tuple(tensor.shape),
                parameters=size,
                loaded=size if taken else 0,
                source=keys[0] if taken else None,
            )
        )
    return LoadReport(tuple(records))
