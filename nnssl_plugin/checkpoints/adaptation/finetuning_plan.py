"""Checkpoint × target dataset → a fine-tuning plan, its weights and the load report."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.checkpoints.adaptation.adapt import (
    MIN_COVERAGE,
    adapt_weights,
    architecture_differences,
    check_coverage,
)
from nnssl_plugin.checkpoints.adaptation.arrays import fit_arrays
from nnssl_plugin.checkpoints.adaptation.fitting_tables import fitting_tables
from nnssl_plugin.checkpoints.adaptation.inputs import compare_ct_windows, compare_inputs, unstated
from nnssl_plugin.checkpoints.adaptation.options import DEFAULT_OPTIONS, AdaptationOptions
from nnssl_plugin.checkpoints.adaptation.report import LoadReport
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_input, describe_network, weights_hash
from nnssl_plugin.checkpoints.format.spatial_arrays import as_state
from nnssl_plugin.checkpoints.sources.source import Source, read_source
from nnssl_plugin.checkpoints.sources.stems import with_stem
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.plans import (
    build_network,
    check_name,
    dataset_folder,
    read_dataset_json,
    read_plan,
    resolve_configuration,
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
    method: str | None = None
    """Of the weights, where their provenance names it."""
    arrays: tuple[str, ...] = ()
    """The checkpoint's spatial arrays that hold something of a channel of the dataset."""


def adapt_checkpoint(
    dataset: str,
    *,
    name: str,
    weights: str | Path | None = None,
    configuration: str = "3d_fullres",
    plans_name: str = "nnUNetPlans",
    from_scratch: bool = False,
    min_coverage: float = MIN_COVERAGE,
    mapping: str | Path | None = None,
    stem: str | None = None,
    options: AdaptationOptions = DEFAULT_OPTIONS,
    trust: bool = False,
) -> Adapted:
    """Write the plan ``PLANS-NAME.json`` for fine-tuning beside the plan of a preprocessed dataset.

    Beside it come ``PLANS-NAME_CONFIG.pth`` (the complete state dict of the target's network, which stock nnU-Net's
    ``-pretrained_weights`` takes too, and the checkpoint's spatial arrays on the target's grid) and
    ``PLANS-NAME_CONFIG_report.json`` (every tensor).

    Args:
        dataset: ID or full name of the target.
        name: what the runs are told apart by.
        weights: anything that ``read_source`` reads; not needed for a plan from scratch.
        configuration: the configuration that will be fine-tuned.
        plans_name: the target's plan; settings in its ``finetuning`` block, if it has one, are kept.
        from_scratch: write a plan that trains on the same schedule from random weights.
        min_coverage: smallest accepted fraction of the encoder's parameters, in [0, 1].
        mapping: table by which the keys of foreign weights are renamed (``read_source``).
        stem: ID of the stem that is taken, of a network that has one for each dataset of its training (``inspect``).
        options: changes of shape that are asked for.
        trust: build the target's network whatever class its plan names.

    Raises:
        UserError: for something that is missing, weights that do not fit, or a name that is taken.
    """
    check_name(name)
    if weights is None and not from_scratch:
        raise UserError("No checkpoint was named.", "Add -w CHECKPOINT, or --from-scratch for random weights.")
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, plans_name), read_dataset_json(folder)
    network = describe_network(plans, configuration)  # refuses an unknown configuration before the checkpoint is read
    check_name(new_name := f"{plans_name}-{name}")
    source = with_stem(read_source(weights, mapping=mapping), stem) if weights is not None else None
    file = None if from_scratch else folder / f"{new_name}_{configuration}.pth"
    block = _block(plans, configuration, file)
    if source is not None:
        digest = weights_hash(source.weights)
        block["twin_of" if from_scratch else "source"] = _summary(source, digest, options)
    plan = {key: value for key, value in plans.items() if key != "pretraining"} | {"plans_name": new_name, BLOCK: block}
    plan_file = folder / f"{new_name}.json"
    _check_free(folder, plan, configuration)
    if file is None or source is None or weights is None:  # from scratch: the last two follow
        write_json(plan_file, plan)
        return Adapted(new_name, plan_file, None, None, None)

    state, report = _fit(source, plans, configuration, dataset_json, options, trust=trust)
    report = report.with_warnings(input_differences(source, digest, plans, configuration, dataset_json))
    tables = [] if report.covers(min_coverage) else _other_tables(weights, mapping)
    check_coverage(
        report,
        minimum=min_coverage,
        differences=architecture_differences(source.network, network),
        mend=_plan_like(dataset, plans_name, weights, mapping if not tables else tables[0]),
        tables=tables,
    )
    arrays, notes = fit_arrays(source.arrays, plans, configuration, dataset_json)
    channels = describe_input(plans, configuration, dataset_json)["channels"]
    known = tuple(name for name, array in arrays.items() if any(array.number_of(c) is not None for c in channels))
    report = report.with_notes(notes)
    save_checkpoint(_weights_file(source, state, report) | as_state(arrays), file)
    report.save(report_file := file.with_name(f"{file.stem}_report.json"))
    write_json(plan_file, plan)  # last: a plan never names weights that are not there
    return Adapted(new_name, plan_file, file, report_file, report, source.provenance.get("method"), known)


def _other_tables(weights: str | Path, mapping: str | Path | None) -> list[str]:
    """Tables of this package that fit the file, where it was read with none of them."""
    found = fitting_tables(read_source(weights))
    return [] if mapping in found else found


def _plan_like(dataset: str, plans_name: str, weights: str | Path, mapping: str | Path | None) -> str:
    """The command that writes a plan with the network of the checkpoint."""
    return (
        f"nnssl_plugin plan -d {dataset} -p {plans_name} --like {shlex.quote(str(weights))} "
        f"-n {plans_name}-like-pretraining" + (f" --mapping {shlex.quote(str(mapping))}" if mapping else "")
    )


def _block(plans: Mapping[str, Any], configuration: str, file: Path | None) -> dict[str, Any]:
    """The plan's ``finetuning`` block, with the settings that the source plan's block has."""
    kept = {key: value for key, value in plans.get(BLOCK, {}).items() if key not in OWN_KEYS}
    return {**kept, "configuration": configuration, "weights": file.name if file else None}


def _fit(
    source: Source,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    options: AdaptationOptions,
    *,
    trust: bool,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The state dict of the target's freshly built network, and what became of every tensor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build_network(plans, configuration, dataset_json, trust=trust)
    return fit_source(source, network, plans, configuration, options)


def fit_source(
    source: Source,
    network: nn.Module,
    plans: Mapping[str, Any],
    configuration: str,
    options: AdaptationOptions = DEFAULT_OPTIONS,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The state dict of a plan's network with what a checkpoint gives it, and what became of every tensor.

    Args:
        source: what ``read_source`` gave.
        network: the network that the plan names; its values stay where the checkpoint has none.
        plans: the plan.
        configuration: one of its configurations.
        options: changes of shape that are asked for.
    """
    here, patch = describe_network(plans, configuration), resolve_configuration(plans, configuration)["patch_size"]
    known = replace(
        options,
        source_grid=options.source_grid or _token_grid(source.network, _patch_size(source)),
        target_grid=options.target_grid or _token_grid(here, patch),
    )
    return adapt_weights(source.weights, network, trained=source.trained, options=known)


def input_differences(
    source: Source, digest: str, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> list[str]:
    """What the target sees otherwise than the pretraining did, or may see, a line each."""
    provenance, here = source.provenance, describe_input(plans, configuration, dataset_json)
    lines = compare_inputs(provenance, here)
    if provenance.get("normalisation") == here["normalisation"]:
        lines += compare_ct_windows(source.plans, plans, here["normalisation"])
    lines += unstated(provenance)
    recorded = provenance.get("weights_sha256")
    if recorded and "adaptation" not in source.content and recorded != digest:
        lines.append("the weights are not those that the provenance describes (their hash differs)")
    return lines


def _token_grid(network: Mapping[str, Any] | None, patch_size: Sequence[int] | None) -> tuple[int, ...] | None:
    """Tokens per axis of a transformer: its input, or else the patch, divided by the size of an embedded patch."""
    arguments = (network or {}).get("kwargs") or {}
    shape, embedded = arguments.get("input_shape") or patch_size, arguments.get("patch_embed_size")
    if not shape or not embedded:
        return None
    return tuple(size // patch for size, patch in zip(shape, embedded, strict=True))


def _patch_size(source: Source) -> Sequence[int] | None:
    """The patch in voxels that the checkpoint's network was built for."""
    if source.plans and source.configuration:
        return resolve_configuration(source.plans, source.configuration)["patch_size"]
    return source.provenance.get("patch_size")


def _weights_file(source: Source, state: dict[str, Tensor], report: LoadReport) -> dict[str, Any]:
    loaded = [key for record in report.tensors if record.status != "initialised" for key in record.keys]
    return {
        "network_weights": state,
        "adaptation": {"loaded": loaded, "encoder_coverage": report.coverage("encoder")},
        "provenance": source.provenance,
        "citations": source.content.get("citations", source.provenance.get("citations", [])),
    }


def _summary(source: Source, digest: str, options: AdaptationOptions) -> dict[str, Any]:
    """What the plan repeats of the checkpoint, and what was asked for beyond the rule."""
    asked = {name: value for name, value in asdict(options).items() if value}
    summary = {key: source.provenance[key] for key in SUMMARY if key in source.provenance}
    summary = {"checkpoint": source.path.name, **summary, "weights_sha256": digest}
    return json.loads(json.dumps(summary | asked))  # as it reads back from the plan: tuples become lists


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
        raise UserError(
            f"{path} exists, says something else, and was trained with: {results[0]}.",
            "Choose another name with -n, so that these results keep their plan.",
        )
