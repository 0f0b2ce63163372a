"""The commands of a study, in order: the package's and nnU-Net's own, and the folders that they work on."""

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy.ndimage import uniform_filter, zoom
from study_file import ENDING, SCRATCH, SHIFTED, Arm, Selection, Shift, Study, files_by_case, split_folds, tuning_cases

from nnssl_plugin.cli.env import search_path
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.io.scans import stored_bytes

UNLABELLED_ID, LABELLED_ID = 501, 502
UNLABELLED, LABELLED = f"Dataset{UNLABELLED_ID}_StudyUnlabelled", f"Dataset{LABELLED_ID}_StudyLabelled"
PLAN = "nnUNetPlans-study"
RUNS = "runs"
"""Folder of the results of the fine-tunings, a file each."""
PROCESSES = "4"
"""That read and preprocess scans."""
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ONE_THREAD, TRAINING = (Path(__file__).with_name(name) for name in ("one_thread.py", "study_training.py"))


@dataclass(frozen=True)
class Step:
    """One command of a study."""

    title: str
    """Unique; names its log and its mark in the state."""
    stage: str
    """planning, pretraining, separation, tuning or fine-tuning: what its cost counts to."""
    command: tuple[str, ...]
    results: Path | None = None
    """Folder of the fold, for pretrainings: they go on from a checkpoint."""


def lay_out(study: Study, selection: Selection, *, data: Path, folder: Path) -> None:
    """Link the unlabelled scans, and write the raw dataset of labelled cases and its folds.

    Args:
        study: the study.
        selection: its cases.
        data: the folder that the study's folders are relative to.
        folder: the study's own folder.
    """
    images, labels = files_by_case(data, study.data.images), files_by_case(data, study.data.labels)
    scans, raw = folder / "scans", folder / "nnUNet_raw" / LABELLED
    for place in (scans, raw / "imagesTr", raw / "labelsTr"):
        place.mkdir(parents=True, exist_ok=True)
    for case in selection.unlabelled:
        _link(images[case], scans / f"{case}{ENDING}")
    labelled = (*selection.pool, *selection.evaluation, *selection.tuning)
    for case in labelled:
        _link(images[case], raw / "imagesTr" / f"{case}_0000{ENDING}")
        _link(labels[case], raw / "labelsTr" / f"{case}{ENDING}")
    if study.shift is not None:
        for case in selection.evaluation:
            _link(labels[case], raw / "labelsTr" / f"{case}{SHIFTED}{ENDING}")
            write_shifted(images[case], raw / "imagesTr" / f"{case}{SHIFTED}_0000{ENDING}", study.shift)
        labelled += tuple(f"{case}{SHIFTED}" for case in selection.evaluation)
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": study.data.modality},
            "labels": {"background": 0} | {name: value for value, name in enumerate(study.data.label_names, 1)},
            "numTraining": len(labelled),
            "file_ending": ENDING,
            "overwrite_image_reader_writer": "NibabelIOWithReorient",
            "licence": study.data.licence,
        },
    )
    write_json(folder / "nnUNet_preprocessed" / LABELLED / "splits_final.json", split_folds(study, selection))


def write_shifted(source: Path, target: Path, shift: Shift) -> None:
    """A scan with another look on the same grid, unless it is there already."""
    if target.exists():
        return
    image = nibabel.load(source)
    seen = with_another_look(np.asarray(image.dataobj, dtype=np.float32), shift)
    with atomic_path(target) as temporary:
        temporary.write_bytes(stored_bytes(nibabel.Nifti1Image(seen, image.affine)))


def with_another_look(voxels: np.ndarray, shift: Shift) -> np.ndarray:
    """What a coarser scanner with another contrast would have seen.

    Intensities between the 0.5th and the 99.5th percentile, brought to [0, 1], are raised to the power of ``gamma``
    (what lies outside is cut off); then blocks of ``coarser`` voxels along each axis are averaged, and the averages
    interpolated linearly.

    Args:
        voxels: (x, y, z).
        shift: how strong.
    """
    low, high = np.percentile(voxels, (0.5, 99.5))
    scaled = np.clip((voxels - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1) ** shift.gamma
    averaged = uniform_filter(low + (high - low) * scaled, shift.coarser, mode="nearest")
    small = zoom(averaged, 1 / shift.coarser, order=1, mode="nearest", grid_mode=True)
    factors = np.divide(voxels.shape, small.shape)
    return zoom(small, factors, order=1, mode="nearest", grid_mode=True).astype(np.float32)


def flags_of(block: dict[str, Any]) -> list[str]:
    """A block of a study as flags of a command."""
    return [word for flag, value in block.items() for word in (f"--{flag}", str(value))]


def planning_steps(study: Study, folder: Path, *, device: str = "cpu") -> list[Step]:
    """From scans to two preprocessed datasets under one plan."""
    clip_device = device if device == "cuda" else "cpu"  # what the command knows
    unlabelled, labelled = str(UNLABELLED_ID), str(LABELLED_ID)
    commands = {
        "prepare": (
            "nnssl_plugin",
            "prepare",
            "-i",
            str(folder / "scans"),
            "-d",
            unlabelled,
            "-n",
            UNLABELLED.partition("_")[2],
            "--modality",
            study.data.modality,
            "--keep",
        ),
        "plan": ("nnUNetv2_plan_and_preprocess", "-d", unlabelled, "-npfp", PROCESSES, "--no_pp"),
        "plan-target": ("nnUNetv2_plan_and_preprocess", "-d", labelled, "-npfp", PROCESSES, "--no_pp"),
        "edit-plan": edit_command(unlabelled, "nnUNetPlans", PLAN, study.plan),
        "move-plan": (
            "nnUNetv2_move_plans_between_datasets",
            "-s",
            unlabelled,
            "-t",
            labelled,
            "-sp",
            PLAN,
            "-tp",
            PLAN,
        ),
        "preprocess": (
            "nnUNetv2_preprocess",
            "-d",
            unlabelled,
            labelled,
            "-plans_name",
            PLAN,
            "-c",
            study.configuration,
            "-np",
            PROCESSES,
        ),
    }
    if study.captions is not None:
        commands["caption"] = ("nnssl_plugin", "caption", "-d", unlabelled, *flags_of(study.captions))
    if study.clip is not None:
        commands["clip"] = ("nnssl_plugin", "clip", "-d", unlabelled, "-device", clip_device, *flags_of(study.clip))
    for name, pretraining in study.trained.items():
        preset = ("--preset", pretraining.preset) if pretraining.preset else ()
        commands[f"settings-{name}"] = edit_command(unlabelled, PLAN, pretraining_plan(name), pretraining.edits, preset)
    return [Step(title, "planning", command) for title, command in commands.items()]


def pretraining_steps(study: Study, folder: Path, *, device: str) -> list[Step]:
    """One training for each pretraining."""
    return [
        Step(
            f"pretrain-{name}",
            "pretraining",
            _train(UNLABELLED_ID, study.configuration, "all", pretraining.trainer, pretraining_plan(name), device),
            results=pretraining_folder(study, folder, name),
        )
        for name, pretraining in study.trained.items()
    ]


def separation_steps(study: Study, folder: Path, *, device: str) -> list[Step]:
    """For each pretraining, where the study asks for it, token separation on the evaluation cases."""
    if study.separation is None:
        return []
    return [
        Step(
            f"separation-{name}",
            "separation",
            (
                "nnssl_plugin",
                "evaluate",
                "tokens",
                "-d",
                str(LABELLED_ID),
                "-c",
                study.configuration,
                "-p",
                PLAN,
                "-w",
                str(pretraining_folder(study, folder, name) / "checkpoint_final.pth"),
                "-f",
                "0",
                "--stride",
                str(study.separation.stride),
                "-device",
                device,
                "-o",
                str(separation_file(folder, name)),
            ),
        )
        for name in study.trained
    ]


def probe_steps(study: Study, folder: Path, *, device: str) -> list[Step]:
    """Where the study asks for it, a linear readout of every frozen encoder on the tuning cases, in one command."""
    if study.probe is None or not study.trained:
        return []
    sources = {name: pretraining_folder(study, folder, name) / "checkpoint_final.pth" for name in study.trained}
    weights = [f"{name}={path}" for name, path in sources.items()]
    dataset = ("-d", str(LABELLED_ID), "-c", study.configuration, "-p", PLAN, "-f", str(len(study.folds)))
    draws = ("--labelled", str(study.probe.labelled), "--seeds", *map(str, study.probe.seeds))
    command = ("nnssl_plugin", "evaluate", "probe", *dataset, *draws, "-device", device)
    return [Step("probe", "probe", (*command, "-o", str(probe_file(folder)), "-w", *weights))]


def adaptation_steps(study: Study, folder: Path) -> list[Step]:
    """For each pretraining, and for random weights, the plan for fine-tuning."""
    sources = {
        name: ("-w", str(pretraining_folder(study, folder, name) / "checkpoint_final.pth")) for name in study.trained
    }
    command = ("nnssl_plugin", "adapt", "-d", str(LABELLED_ID), "-c", study.configuration, "-p", PLAN, "-n")
    return [
        Step(f"adapt-{name}", "planning", (*command, name, *source))
        for name, source in (sources | {SCRATCH: ("--from-scratch",)}).items()
    ]


def tuning_runs(study: Study, selection: Selection) -> dict[str, list[dict[str, Any]]]:
    """Recipe → the runs of all arms that it is tried with; empty where there is nothing to choose."""
    if len(study.recipes) < 2:
        return {}
    _, scored = tuning_cases(study, selection)
    return {
        recipe: [
            _run(study, arm, f"tune-{recipe}-{arm.name}", recipe=recipe, seed=0, fold=len(study.folds), cases=scored)
            for arm in study.arms
        ]
        for recipe in study.recipes
    }


def finetuning_runs(study: Study, selection: Selection, chosen: dict[str, str]) -> dict[int, list[dict[str, Any]]]:
    """Seed → its runs: every arm on every fraction, most labels first, then the short schedules.

    Args:
        study: the study.
        selection: its cases.
        chosen: arm → recipe.
    """
    shifted = [f"{case}{SHIFTED}" for case in selection.evaluation] if study.shift else []

    def run(arm: Arm, seed: int, fraction: float, ending: str, epochs: int | None = None) -> dict[str, Any]:
        name, fold = f"{arm.name}-seed{seed}-{ending}", study.folds.index((seed, fraction))
        chosen_for = {"recipe": chosen[arm.name], "seed": seed, "fold": fold, "cases": selection.evaluation}
        return _run(study, arm, name, **chosen_for, epochs=epochs) | {"fraction": fraction}

    runs = {}
    for seed in study.seeds:
        whole = [
            run(arm, seed, fraction, f"{fraction:g}") | {"shifted": shifted}
            for fraction in sorted(study.fractions, reverse=True)
            for arm in study.arms
        ]
        short = [
            run(arm, seed, study.largest, f"{epochs}epochs", epochs)
            for epochs in sorted(study.schedules)
            for arm in study.arms
        ]
        runs[seed] = whole + short
    return runs


def training_step(
    study: Study, folder: Path, title: str, stage: str, runs: list[dict[str, Any]], *, device: str, one_thread: bool
) -> Step:
    """One process that carries out the runs; what they are is written to a file of the folder."""
    file = folder / "jobs" / f"{title}.json"
    job = {
        "dataset": LABELLED,
        "configuration": study.configuration,
        "device": device,
        "one_thread": one_thread,
        "workers": 0 if device == "cpu" else 2,
        "mirroring": study.mirroring,
        "label_names": list(study.data.label_names),
        "results": str(folder / RUNS),
        "runs": runs,
    }
    file.parent.mkdir(exist_ok=True)
    write_json(file, job)
    return Step(title, stage, (sys.executable, str(TRAINING), str(file)))


def pretraining_plan(name: str) -> str:
    """Name of the plan by which a pretraining runs."""
    return f"{PLAN}-{name}"


def _run(
    study: Study,
    arm: Arm,
    name: str,
    *,
    recipe: str | None,
    seed: int,
    fold: int,
    cases: Sequence[str],
    epochs: int | None = None,
) -> dict[str, Any]:
    """What study_training.py needs to know of a fine-tuning, and what its result says of it."""
    settings = study.finetuning | study.recipes.get(recipe, {}) | arm.finetuning | {"seed": seed}
    return {
        "name": name,
        "arm": arm.name,
        "recipe": recipe,
        "seed": seed,
        "fold": fold,
        "plan": f"{PLAN}-{study.start(arm, seed)}",
        "settings": settings | ({"epochs": epochs} if epochs else {}),
        "schedule": epochs,
        "cases": list(cases),
        "shifted": [],
    }


def pretraining_folder(study: Study, folder: Path, name: str) -> Path:
    """Where nnU-Net writes a pretraining."""
    run = f"{study.trained[name].trainer}__{pretraining_plan(name)}__{study.configuration}"
    return folder / "nnUNet_results" / UNLABELLED / run / "fold_all"


def separation_file(folder: Path, name: str) -> Path:
    """Where the token separation of a pretraining is written."""
    return folder / "separation" / f"{name}.json"


def probe_file(folder: Path) -> Path:
    """Where the probe of all pretrainings is written."""
    return folder / "probe.json"


def executable(step: Step, *, one_thread: bool) -> list[str]:
    """What to run for a step: its command, continued where a checkpoint is, with one thread where asked for."""
    words = list(step.command)
    if step.results is None:
        return words
    if any((step.results / f"checkpoint_{kind}.pth").is_file() for kind in ("final", "latest")):
        words.append("--c")
    return [sys.executable, str(ONE_THREAD), *words[1:]] if one_thread else words


def environment(folder: Path, *, one_thread: bool) -> dict[str, str]:
    """The user's environment with nnU-Net's folders inside ``folder`` and this package's trainers."""
    variables = dict(os.environ) | {name: str(folder / name) for name in FOLDERS}
    variables.pop("nnUNet_n_proc_DA", None)  # 0 makes planning fail; trainings get it from training_environment
    variables |= {"nnUNet_extTrainer": search_path(), "nnUNet_def_n_proc": "2"}
    variables.setdefault("nnUNet_compile", "f")
    variables["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), variables.get("PATH", os.defpath)])
    if one_thread:
        variables["OMP_NUM_THREADS"] = "1"
    return variables


def training_environment(stage: str, *, device: str, one_thread: bool) -> dict[str, str]:
    """Further variables of trainings: how many workers of nnU-Net's load; fine-tunings have their own."""
    workers = "0" if device == "cpu" or stage in ("tuning", "fine-tuning") else "1"
    return {"nnUNet_n_proc_DA": workers} | ({"nnUNet_def_n_proc": "1"} if one_thread else {})


def edit_command(
    dataset: str, source: str, name: str, edits: dict[str, Any], flags: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """``nnssl_plugin plan`` with edits as ``--set KEY=JSON``."""
    assignments = [f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in edits.items()]
    return (
        "nnssl_plugin",
        "plan",
        "-d",
        dataset,
        "-p",
        source,
        "-n",
        name,
        *flags,
        *(["--set", *assignments] if assignments else []),
    )


def _train(dataset: int, configuration: str, fold: str, trainer: str, plan: str, device: str) -> tuple[str, ...]:
    return ("nnUNetv2_train", str(dataset), configuration, fold, "-tr", trainer, "-p", plan, "-device", device)


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        target.symlink_to(source.resolve())
    except OSError:  # file systems without links
        shutil.copyfile(source, target)
