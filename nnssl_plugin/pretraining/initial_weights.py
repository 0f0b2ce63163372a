"""Continual pretraining: weights that a pretraining starts from, named in the plan's ``pretraining`` block."""

import json
import shlex
from os.path import join
from pathlib import Path
from typing import Any

from nnssl_plugin.checkpoints.adaptation.adapt import architecture_differences, check_coverage
from nnssl_plugin.checkpoints.adaptation.arrays import fit_arrays
from nnssl_plugin.checkpoints.adaptation.finetuning_plan import fit_source, input_differences
from nnssl_plugin.checkpoints.adaptation.report import LoadReport
from nnssl_plugin.checkpoints.format.provenance import describe_network, weights_hash
from nnssl_plugin.checkpoints.sources.source import Source, read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone

REPORT = "initial_weights_report.json"
"""File in the results folder that lists every tensor of the network."""
KEPT = ("method", "date", "data", "steps", "licence", "citations", "packages", "continued_from")
"""What a checkpoint repeats of the provenance of the weights that it started from; the last makes a chain."""


def take_weights_entry(block: dict[str, Any]) -> str | None:
    """Take ``weights`` out of a ``pretraining`` block.

    Raises:
        UserError: when it is neither a file name nor null.
    """
    weights = block.pop("weights", None)
    if not isinstance(weights, str | None):
        raise UserError(
            f"Setting 'weights' of the pretraining block is {weights!r}; expected a file name or null.",
            "nnssl_plugin plan -d ID -n NAME --set weights=FILE",
        )
    return weights


def start_from(trainer, weights: str) -> dict[str, Any]:
    """Put weights into the trainer's network; its task then copies them into its teachers (``on_weights_loaded``), and
    arrays that the method learns beside its network (templates) go on, too, on the grid of the plan.

    The report is logged and saved in the results folder.

    Args:
        trainer: a ``Pretrainer`` that is initialised.
        weights: file, relative to the preprocessed dataset's folder, of any kind that ``read_source`` knows.

    Returns:
        where the weights come from, for the provenance of the new checkpoint; ``trained`` are the prefixes of the
        network's keys that they cover whole.

    Raises:
        UserError: when the file is missing or unreadable, or covers too little of the encoder.
    """
    path = Path(trainer.preprocessed_dataset_folder_base, weights)
    if not path.exists():
        raise UserError(
            f"The weights {path} that plan {trainer.plans_manager.plans_name} starts from are not there.",
            "Copy them there, or name another file: nnssl_plugin plan -d ID -n NAME --set weights=FILE",
        )
    source, backbone = read_source(path), trainer.task.backbone
    plans, configuration = trainer.plans_manager.plans, trainer.configuration_name
    digest = weights_hash(source.weights)
    state, report = fit_source(source, backbone.network, plans, configuration)
    report = report.with_warnings(input_differences(source, digest, plans, configuration, trainer.dataset_json))
    dataset, name = plans["dataset_name"], plans["plans_name"]
    check_coverage(
        report,
        differences=architecture_differences(source.network, describe_network(plans, configuration)),
        mend=f"nnssl_plugin plan -d {dataset} -p {name} --like {shlex.quote(str(path))} -n {name}-like",
    )
    backbone.network.load_state_dict(state)
    trainer.task.on_weights_loaded()
    known = {name: array for name, array in source.arrays.items() if name in trainer.continued_arrays}
    arrays, notes = fit_arrays(known, plans, configuration, trainer.dataset_json)
    trainer.take_arrays(arrays)
    report = report.with_notes(notes)
    if trainer.local_rank == 0:
        report.save(join(trainer.output_folder, REPORT))
    trainer.print_to_log_file(f"Pretraining goes on from {path}\n{report.table()}", add_timestamp=False)
    return origin_of(source, digest) | {"trained": _covered(backbone, report)}


def origin_of(source: Source, digest: str) -> dict[str, Any]:
    said = {key: source.provenance[key] for key in KEPT if key in source.provenance}
    origin = {"checkpoint": source.path.name, "kind": source.kind, "weights_sha256": digest}
    return json.loads(json.dumps(origin | said))  # as it reads back from a file: tuples become lists


def _covered(backbone: Backbone, report: LoadReport) -> list[str]:
    fresh = [key for record in report.initialised() for key in record.keys]
    keys = backbone.network.state_dict().keys()
    return [
        prefix
        for prefix in backbone.prefixes
        if any(key.startswith(prefix) for key in keys) and not any(key.startswith(prefix) for key in fresh)
    ]
