"""Checkpoint × target dataset → a fine-tuning plan, its weights and the load report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_plugin.checkpoints.adaptation import (
    MIN_COVERAGE,
    adapt_weights,
    architecture_differences,
    check_coverage,
)
from nnssl_plugin.checkpoints.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.provenance import describe_input, describe_network, weights_hash
from nnssl_plugin.checkpoints.report import LoadReport, compare_inputs
from nnssl_plugin.errors import UserError
from nnssl_plugin.files import write_json
from nnssl_plugin.plan_files import (
    build_network,
    check_name,
    dataset_folder,
    input_channels,
    read_dataset_json,
    read_plan,
    results_of,
)

BLOCK = "finetuning"
SEED = 12345
"""Seed of the tensors that start fresh in the written file, so that adapting twice gives the same file."""
SUMMARY = ("method", "date", "data", "steps", "licence", "citations", "packages")
"""What a plan repeats of the checkpoint's provenance."""
OWN_KEYS = ("weights", "source", "twin_of", "configuration")
"""Keys of the block that :func:`adapt_checkpoint` writes; the others are settings of the trainer and are kept."""


@dataclass(frozen=True)
class Adapted:
    """What :func:`adapt_checkpoint` wrote."""

    plans_name: str
    plan: Path
    weights: Path | None
    report_file: Path | None
    report: LoadReport | None


def adapt_checkpoint(
    dataset: str,
    *,
    name: str,
    weights: str | Path | None = None,
    configuration: str = "3d_fullres",
    plans_name: str = "nnUNetPlans",
    from_scratch: bool = False,
    min_coverage: float = MIN_COVERAGE,
) -> Adapted:
    """Write the plan ``PLANS-NAME.json`` for fine-tuning beside the plan of a preprocessed dataset.

    Beside it come ``PLANS-NAME_CONFIG.pth`` (the complete state dict of the target's network; stock
    ``nnUNetTrainer -pretrained_weights`` takes it too) and ``PLANS-NAME_CONFIG_report.json`` (every tensor).

    Args:
        dataset: ID or full name of the target.
        name: what the runs are told apart by.
        weights: checkpoint of a pretraining, of nnU-Net or of nnssl; not needed for a plan from scratch.
        configuration: the configuration that will be fine-tuned.
        plans_name: the target's plan; settings in its ``finetuning`` block, if it has one, are kept.
        from_scratch: write the twin, which trains on the same schedule from random weights.
        min_coverage: smallest accepted fraction of the encoder's parameters, in [0, 1].

    Raises:
        UserError: for a missing dataset, plan, configuration or checkpoint; for weights that do not fit; for a name
            that is taken.
    """
    check_name(name)
    if weights is None and not from_scratch:
        raise UserError("No checkpoint was named.", "Add -w CHECKPOINT, or --from-scratch for the twin without one.")
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, plans_name), read_dataset_json(folder)
    describe_network(plans, configuration)  # refuses an unknown configuration before the checkpoint is read
    new_name = f"{plans_name}-{name}"
    check_name(new_name)
    checkpoint = _read_weights(weights) if weights is not None else None
    file = None if from_scratch else folder / f"{new_name}_{configuration}.pth"
    block = _block(plans, configuration, file)
    if checkpoint is not None:
        block["twin_of" if from_scratch else "source"] = _summary(checkpoint, Path(weights).name)
    plan = {key: value for key, value in plans.items() if key != "pretraining"} | {"plans_name": new_name, BLOCK: block}
    _check_free(folder, plan, configuration)
    if file is None:
        write_json(folder / f"{new_name}.json", plan)
        return Adapted(new_name, folder / f"{new_name}.json", None, None, None)

    state, report = _fit(checkpoint, plans, configuration, dataset_json)
    differences = architecture_differences(_source_network(checkpoint), describe_network(plans, configuration),
                                           configuration)
    check_coverage(report, minimum=min_coverage, differences=differences,
                   mend=f"nnssl_plugin plan -d {dataset} -p {plans_name} -n {plans_name}-like-pretraining")
    report_file = file.with_name(f"{file.stem}_report.json")
    save_checkpoint(_weights_file(checkpoint, state, report), file)
    report.save(report_file)
    write_json(folder / f"{new_name}.json", plan)  # last: a plan never names weights that are not there
    return Adapted(new_name, folder / f"{new_name}.json", file, report_file, report)


def _block(plans: Mapping[str, Any], configuration: str, file: Path | None) -> dict[str, Any]:
    """The plan's ``finetuning`` block, with the settings that the source plan's block has."""
    kept = {key: value for key, value in plans.get(BLOCK, {}).items() if key not in OWN_KEYS}
    return {**kept, "configuration": configuration, "weights": file.name if file else None}


def _read_weights(path: str | Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("network_weights")
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no 'network_weights'.",
                        "Give the checkpoint of a pretraining, of nnU-Net or of nnssl (checkpoint_final.pth).")
    return checkpoint


def _fit(
    checkpoint: Mapping[str, Any], plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> tuple[dict[str, Tensor], LoadReport]:
    """The target's state dict, and the report with everything that the target sees otherwise than pretraining."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build_network(plans, configuration, dataset_json)
    provenance = checkpoint.get("provenance", {})
    state, report = adapt_weights(checkpoint["network_weights"], network, trained=provenance.get("trained"))
    warnings = compare_inputs(provenance, describe_input(plans, configuration, dataset_json))
    block = checkpoint.get("nnssl_adaptation_plan", {})
    before, now = block.get("pretrain_num_input_channels"), input_channels(plans, configuration, dataset_json)
    if before is not None and before != now:
        warnings.append(f"the network read {before} channels in pretraining and reads {now} here: "
                        "its first layer starts fresh")
    recorded = provenance.get("weights_sha256")
    if recorded and recorded != weights_hash(checkpoint["network_weights"]):
        warnings.append("the weights are not those that the provenance describes (their hash differs)")
    return state, report.with_warnings(warnings)


def _source_network(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Class and arguments of the checkpoint's network, from our provenance or nnssl's plan; None where neither says."""
    known = checkpoint.get("provenance", {}).get("network")
    nnssl = checkpoint.get("nnssl_adaptation_plan", {}).get("architecture_plans", {})
    if known is None and nnssl.get("arch_kwargs"):
        return {"class": nnssl["arch_class_name"], "kwargs": nnssl["arch_kwargs"]}
    return known


def _weights_file(checkpoint: Mapping[str, Any], state: dict[str, Tensor], report: LoadReport) -> dict[str, Any]:
    loaded = [key for record in report.tensors if record.status != "initialised" for key in record.keys]
    return {
        "network_weights": state,
        "adaptation": {"loaded": loaded, "encoder_coverage": report.coverage("encoder")},
        "provenance": checkpoint.get("provenance", {}),
        "citations": checkpoint.get("citations", []),
    }


def _summary(checkpoint: Mapping[str, Any], file: str) -> dict[str, Any]:
    provenance = checkpoint.get("provenance", {})
    summary = {key: provenance[key] for key in SUMMARY if key in provenance}
    summary = {"checkpoint": file, **summary, "weights_sha256": weights_hash(checkpoint["network_weights"])}
    return json.loads(json.dumps(summary))  # as it reads back from the plan: tuples become lists


def _check_free(folder: Path, plan: Mapping[str, Any], configuration: str) -> None:
    """Refuse to replace a plan that something else wrote, is for another configuration, or has been trained with."""
    name = plan["plans_name"]
    path = folder / f"{name}.json"
    if not path.exists():
        return
    present = read_plan(folder, name)
    if present == plan:
        return
    block = present.get(BLOCK)
    if block is None or block.get("configuration") != configuration:
        whose = "was not written by adapt" if block is None else f"is for {block.get('configuration')}"
        raise UserError(f"{path} exists and {whose}.", "Choose another name with -n.")
    results = results_of(folder.name, name)
    if results:
        raise UserError(f"{path} exists, says something else, and was trained with: {results[0]}.",
                        "Choose another name with -n, so that these results keep their plan.")
