"""The first step of a run that was skipped: a small file beside its checkpoints that says what to look at.

Nothing waits for the device while steps are made: the number of the step is read at the end of the epoch, and its
batch, a function of (seed, rank, step), is read again.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl_plugin.data.mixture import MixedBatches
from nnssl_plugin.data.windows import read_window
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import dataset_folder, read_plan, resolve_configuration
from nnssl_plugin.pretraining.batches import TRAIN
from nnssl_plugin.training.resumable import LATEST

FILE = "skipped_step.json"
KEY = "skipped_step"
"""Entry that tells such a file from others; its value is the number of the step."""


def tell_of_skipped(trainer) -> None:
    """Name the cases of the first skipped step of a ``Pretrainer``'s epoch, and keep a description of the run's first.

    ``trainer`` is at the end of the epoch, and its sums still hold it.
    """
    first = int(trainer.sums.first_skipped)
    if first < 0:
        return
    step = trainer.current_epoch * trainer.training_settings.iterations_per_epoch + first
    described = describe_skipped(trainer, step)
    save_skipped(described, trainer.output_folder)
    trainer.print_to_log_file(skipped_warning(described))


def stop_if_broken(trainer) -> None:
    """End a run whose steps are skipped one after another.

    Raises:
        UserError: when as many were skipped in a row as the settings allow.
    """
    streak = int(trainer.sums.longest_streak)
    if streak >= trainer.training_settings.max_skipped_in_a_row:
        raise UserError(
            f"{streak} steps in a row had a non-finite loss or gradient (epoch {trainer.current_epoch}): stopped.",
            f"The last good checkpoint is {Path(trainer.output_folder, LATEST)}. Look for NaN in the images, then try "
            "a lower lr: nnssl_plugin plan -d ID -n NAME --set lr=1e-5",
        )


def describe_skipped(trainer, step: int) -> dict[str, Any]:
    """What the file says of a step: names, places and finiteness of this rank's samples, seeds, and terms.

    Args:
        trainer: a ``Pretrainer``.
        step: the number of the step, from 0.
    """
    seeds = trainer.seeds(TRAIN, step)
    batches = trainer.dataloader_train.batches
    batch = batches[step]
    number = int(batches.order[step]) if isinstance(batches, MixedBatches) else 0
    dataset = trainer.datasets[number]
    finite = batch["image"].flatten(1).isfinite().all(1).tolist()
    rows = zip(batch["cases"], batch["places"], finite, strict=True)
    terms = {name: float(value) for name, value in trainer.sums.first_terms.items()}
    return {
        KEY: step,
        "epoch": trainer.current_epoch,
        "dataset": dataset.name,
        "plans_name": dataset.plans["plans_name"],
        "configuration": dataset.configuration,
        "kind": batch["kind"],
        "rank": trainer.local_rank,
        "seeds": {"run": trainer.training_settings.seed, "views": seeds[0], "dropout": seeds[1]},
        "samples": [{"case": case, **vars(place), "image_finite": fine} for case, place, fine in rows],
        "cases_of_all_ranks": batches.cases_of_all_ranks(step),
        "terms": {name: value if math.isfinite(value) else str(value) for name, value in terms.items()},
    }


def save_skipped(described: Mapping[str, Any], folder: str | Path) -> None:
    """Write the file, unless an earlier step of the run has one there."""
    path = Path(folder, FILE)
    if not path.exists():
        write_json(path, dict(described))


def skipped_warning(described: Mapping[str, Any]) -> str:
    """A line for the log."""
    broken = [sample["case"] for sample in described["samples"] if not sample["image_finite"]]
    cause = f"not finite in the image: {', '.join(broken)}" if broken else "their images are finite"
    return (
        f"WARNING: step {described[KEY]} was the first to be skipped. Its cases: "
        f"{', '.join(described['cases_of_all_ranks'])}; {cause}."
    )


def is_skipped_file(path: str | Path) -> bool:
    """Whether a file is one that :func:`save_skipped` wrote."""
    return Path(path).suffix == ".json" and Path(path).is_file() and KEY in read_json(path, dict)


def skipped_screen(path: str | Path) -> str:
    """What the file says, and how to see the step again."""
    said = read_json(path, dict)
    try:
        samples = [
            f"  {each['case']}: begins at voxel {each['origin']}, extent {each['extent']} of {each['case_shape']}, "
            + ("finite" if each["image_finite"] else "NOT FINITE")
            for each in said["samples"]
        ]
        terms = ", ".join(f"{name} {value}" for name, value in said["terms"].items())
        return "\n".join(
            [
                f"step {said[KEY]} (epoch {said['epoch']}) of {said['dataset']}, {said['plans_name']}, "
                f"{said['configuration']} ({said['kind']}), rank {said['rank']}: the first that was skipped",
                f"terms: {terms}",
                "seeds: " + ", ".join(f"{name} {seed}" for name, seed in said["seeds"].items()),
                *samples,
                "",
                "see its windows (Python):",
                f"  from nnssl_plugin.pretraining.skipped_steps import windows_of; windows_of({str(path)!r})",
                "replay it: go on from a checkpoint that was written before it (the training's own command with --c);",
                f"with the same plan and ranks step {said[KEY]} draws this batch, these views and this dropout again",
            ]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {type(error).__name__} {error}.", "Name one that a training wrote."
        ) from error


def windows_of(path: str | Path) -> list[np.ndarray]:
    """The windows (C, z, y, x) of the samples that the file names, as preprocessing left them."""
    said = read_json(path, dict)
    folder = dataset_folder(said["dataset"])
    planned = resolve_configuration(read_plan(folder, said["plans_name"]), said["configuration"])
    cases = str(folder / planned["data_identifier"])
    dataset = infer_dataset_class(cases)(cases, sorted({each["case"] for each in said["samples"]}))
    return [read_window(dataset.load_case(each["case"])[0], each["origin"], each["extent"]) for each in said["samples"]]
