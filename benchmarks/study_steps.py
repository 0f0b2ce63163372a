"""The commands of a study, in order: the package's and nnU-Net's own, and the folders that they work on."""

import json
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_file import ENDING, Arm, Selection, Study, files_by_case, split_folds

from nnssl_plugin.cli.env import search_path
from nnssl_plugin.io.files import write_json

UNLABELLED_ID, LABELLED_ID = 501, 502
UNLABELLED, LABELLED = f"Dataset{UNLABELLED_ID}_StudyUnlabelled", f"Dataset{LABELLED_ID}_StudyLabelled"
PLAN = "nnUNetPlans-study"
FINETUNER = "PretrainedSegmentationTrainer"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ONE_THREAD = Path(__file__).with_name("one_thread.py")


@dataclass(frozen=True)
class Step:
    """One command of a study."""

    title: str
    """Unique; names its log and its mark in the state."""
    stage: str
    """planning, pretraining, separation or fine-tuning: what its cost counts to."""
    command: tuple[str, ...]
    results: Path | None = None
    """Folder of the fold, for trainings."""


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
    labelled = (*selection.pool, *selection.evaluation)
    for case in labelled:
        _link(images[case], raw / "imagesTr" / f"{case}_0000{ENDING}")
        _link(labels[case], raw / "labelsTr" / f"{case}{ENDING}")
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


def planning_steps(study: Study, folder: Path) -> list[Step]:
    """From scans to two preprocessed datasets under one plan."""
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
        "plan": ("nnUNetv2_plan_and_preprocess", "-d", unlabelled, "-npfp", "2", "--no_pp"),
        "plan-target": ("nnUNetv2_plan_and_preprocess", "-d", labelled, "-npfp", "2", "--no_pp"),
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
            "2",
        ),
    }
    if study.captions is not None:
        flags = [word for flag, value in study.captions.items() for word in (f"--{flag}", str(value))]
        commands["caption"] = ("nnssl_plugin", "caption", "-d", unlabelled, *flags)
    for name, pretraining in study.pretrainings.items():
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
        for name, pretraining in study.pretrainings.items()
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
        for name in study.pretrainings
    ]


def adaptation_steps(study: Study, folder: Path) -> list[Step]:
    """For each arm and seed a plan with its settings, and from it the plan for fine-tuning with its weights."""
    steps = []
    for arm in study.arms:
        for seed in study.seeds:
            settings = {f"finetuning.{key}": value for key, value in (study.finetuning | arm.finetuning).items()}
            name = f"{arm.name}-seed{seed}"
            source = (
                ("--from-scratch",)
                if arm.pretraining is None
                else ("-w", str(pretraining_folder(study, folder, arm.pretraining) / "checkpoint_final.pth"))
            )
            steps += [
                Step(
                    f"settings-{name}",
                    "planning",
                    edit_command(str(LABELLED_ID), PLAN, name, settings | {"finetuning.seed": seed}),
                ),
                Step(
                    f"adapt-{name}",
                    "planning",
                    (
                        "nnssl_plugin",
                        "adapt",
                        "-d",
                        str(LABELLED_ID),
                        "-c",
                        study.configuration,
                        "-p",
                        name,
                        "-n",
                        "tuned",
                        *source,
                    ),
                ),
            ]
    return steps


def finetuning_steps(study: Study, folder: Path, *, device: str) -> list[Step]:
    """One training for each seed, fraction and arm; the arms of a fold stand beside each other."""
    return [
        Step(
            f"finetune-{arm.name}-seed{seed}-{fraction:g}",
            "fine-tuning",
            _train(LABELLED_ID, study.configuration, str(fold), FINETUNER, tuned_plan(arm, seed), device),
            results=fold_folder(study, folder, arm, fold),
        )
        for fold, (seed, fraction) in enumerate(study.folds)
        for arm in study.arms
    ]


def pretraining_plan(name: str) -> str:
    """Name of the plan by which a pretraining runs."""
    return f"{PLAN}-{name}"


def tuned_plan(arm: Arm, seed: int) -> str:
    """Name of the plan by which an arm is fine-tuned."""
    return f"{arm.name}-seed{seed}-tuned"


def pretraining_folder(study: Study, folder: Path, name: str) -> Path:
    """Where nnU-Net writes a pretraining."""
    run = f"{study.pretrainings[name].trainer}__{pretraining_plan(name)}__{study.configuration}"
    return folder / "nnUNet_results" / UNLABELLED / run / "fold_all"


def separation_file(folder: Path, name: str) -> Path:
    """Where the token separation of a pretraining is written."""
    return folder / "separation" / f"{name}.json"


def fold_folder(study: Study, folder: Path, arm: Arm, fold: int) -> Path:
    """Where nnU-Net writes the fine-tuning of an arm on a fold."""
    run = f"{FINETUNER}__{tuned_plan(arm, study.folds[fold][0])}__{study.configuration}"
    return folder / "nnUNet_results" / LABELLED / run / f"fold_{fold}"


def executable(step: Step, *, one_thread: bool) -> list[str]:
    """What to run for a step: its command, continued where a checkpoint is, with one thread where asked for.

    A fine-tuning that stopped before its first checkpoint_latest.pth starts again: nnU-Net would go on from the best
    checkpoint, which is no state of the same training.
    """
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


def training_environment(*, one_thread: bool) -> dict[str, str]:
    """Further variables of trainings: augmentation in the process itself, whose seed it then follows."""
    return {"nnUNet_n_proc_DA": "0"} | ({"nnUNet_def_n_proc": "1"} if one_thread else {})


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
