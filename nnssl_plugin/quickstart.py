"""The whole road on generated phantoms, through the same commands that a user types.

Unlabelled scans → dataset 501 → pretraining; labelled cases → dataset 502 → fine-tuning with the pretrained weights
and from scratch → predictions and their Dice. It shows that everything is installed and fits together; phantoms and
minutes of training say nothing about how much pretraining helps.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.files import read_json, write_json
from nnssl_plugin.phantoms import write_phantoms

SHAPE = (24, 40, 32)
SPACING_MM = (2.5, 2.5, 2.5)
UNLABELLED, LABELLED, TEST = 8, 8, 2
"""Number of cases of each kind."""

PRETRAINING_ID, TARGET_ID = "501", "502"
PRETRAINING = "Dataset501_QuickstartUnlabelled"
TARGET = "Dataset502_QuickstartLabelled"
CONFIGURATION = "3d_fullres"
STOCK_PLAN = "nnUNetPlans"
SMALL_PLAN = "nnUNetPlans-small"
PRETRAINER, FINETUNER = "Med3DInsightPretrainer", "PretrainedSegmentationTrainer"
ARMS = ("pretrained", "scratch")

FEATURES = 8
"""Width of the first stage of the small network; each stage doubles it."""
SETTINGS = {
    "epochs": 4,
    "iterations_per_epoch": 10,
    "validation_iterations": 1,
    "lr": 1e-3,
    "figure_every": 2,
    "method.queries": 32,
    "method.dim": 64,
    "method.heads": 4,
    "finetuning.epochs": 12,
    "finetuning.iterations_per_epoch": 25,
    "finetuning.validation_iterations": 2,
}
"""What makes the road short: ``nnssl_plugin plan --set KEY=VALUE``."""


@dataclass(frozen=True)
class Step:
    """One command of the road."""

    title: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    """Variables for this command alone."""


def walk(folder: Path, *, device: str, trainers: str, say: Callable[[str], None]) -> dict[str, float]:
    """Run the road in an empty folder.

    Args:
        folder: receives scans, nnU-Net's three folders, predictions and one log per command.
        device: ``cpu`` or ``cuda``.
        trainers: value of ``nnUNet_extTrainer``.
        say: shows one line to the user.

    Returns:
        arm (:data:`ARMS`) → mean foreground Dice on the test cases.

    Raises:
        UserError: for a folder in use, and for a command that fails.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty.", "Choose another folder with -o, or remove this one.")
    environment = environment_for(folder, trainers)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        say(f"$ export {name}={shlex.quote(environment[name])}")
    say(f'$ eval "$(nnssl_plugin env)"   # nnUNet_extTrainer={trainers}')

    write_scans(folder)
    steps = planning_steps(folder)
    for number, step in enumerate(steps, 1):
        run(step, folder / "logs", number=number, environment=environment, say=say)
    plan = read_json(folder / "nnUNet_preprocessed" / PRETRAINING / f"{STOCK_PLAN}.json")
    for number, step in enumerate(learning_steps(folder, plan, device=device), len(steps) + 1):
        run(step, folder / "logs", number=number, environment=environment, say=say)
    return {arm: _dice(folder / "predictions" / arm) for arm in ARMS}


def write_scans(folder: Path) -> None:
    """Write the unlabelled scans, and the labelled cases as the nnU-Net raw dataset that a user would bring."""
    look = {"shape": SHAPE, "spacing_mm": SPACING_MM}
    target = folder / "nnUNet_raw" / TARGET
    write_phantoms(folder / "scans", UNLABELLED, seed=1, **look)
    write_phantoms(target / "imagesTr", LABELLED, seed=2, labels_folder=target / "labelsTr", **look)
    write_phantoms(target / "imagesTs", TEST, seed=3, labels_folder=target / "labelsTs", **look)
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "first": 1, "second": 2},
        "numTraining": LABELLED,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    write_json(target / "dataset.json", content)


def planning_steps(folder: Path) -> list[Step]:
    """From scans to a planned and captioned dataset."""
    prepare = ("nnssl_plugin", "prepare", "-i", str(folder / "scans"), "-d", PRETRAINING_ID,
               "-n", PRETRAINING.partition("_")[2], "--modality", "MR")
    plan = ("nnUNetv2_plan_and_preprocess", "-d", PRETRAINING_ID, "-c", CONFIGURATION, "-npfp", "2", "-np", "2")
    caption = ("nnssl_plugin", "caption", "-d", PRETRAINING_ID, "--captioner", "template")
    return [Step("prepare", prepare), Step("plan", plan), Step("caption", caption)]


def learning_steps(folder: Path, plan: dict, *, device: str) -> list[Step]:
    """Pretraining, the labelled dataset under the same plan, and both arms of fine-tuning.

    Args:
        folder: the quickstart's folder.
        plan: content of the plan that nnU-Net made for the unlabelled dataset.
        device: ``cpu`` or ``cuda``.
    """
    results = folder / "nnUNet_results"
    checkpoint = results / PRETRAINING / f"{PRETRAINER}__{SMALL_PLAN}__{CONFIGURATION}" / "fold_all"
    steps = [
        Step("shrink", ("nnssl_plugin", "plan", "-d", PRETRAINING_ID, "-p", STOCK_PLAN, "-n", SMALL_PLAN,
                        *_assignments(plan))),
        _training("pretrain", PRETRAINING_ID, "all", PRETRAINER, SMALL_PLAN, device),
        Step("plan-target", ("nnUNetv2_plan_and_preprocess", "-d", TARGET_ID, "-npfp", "2", "--no_pp")),
        Step("move-plan", ("nnUNetv2_move_plans_between_datasets", "-s", PRETRAINING_ID, "-t", TARGET_ID,
                           "-sp", SMALL_PLAN, "-tp", SMALL_PLAN)),
        Step("preprocess-target", ("nnUNetv2_preprocess", "-d", TARGET_ID, "-plans_name", SMALL_PLAN,
                                   "-c", CONFIGURATION, "-np", "2")),
    ]
    for arm in ARMS:
        steps += _arm_steps(folder, arm, checkpoint / "checkpoint_final.pth", device)
    return steps


def _arm_steps(folder, arm, weights, device):
    """Adapt, fine-tune, predict and evaluate."""
    target, predictions = folder / "nnUNet_raw" / TARGET, folder / "predictions" / arm
    plan = f"{SMALL_PLAN}-{arm}"
    adapt = ("nnssl_plugin", "adapt", "-d", TARGET_ID, "-w", str(weights), "-c", CONFIGURATION, "-p", SMALL_PLAN,
             "-n", arm, *(["--from-scratch"] if arm == "scratch" else []))
    predict = ("nnUNetv2_predict", "-i", str(target / "imagesTs"), "-o", str(predictions), "-d", TARGET_ID,
               "-c", CONFIGURATION, "-f", "0", "-tr", FINETUNER, "-p", plan, "-device", device,
               "-step_size", "0.5", "--disable_tta", "--save_probabilities", "-npp", "1", "-nps", "1")
    evaluate = ("nnUNetv2_evaluate_folder", str(target / "labelsTs"), str(predictions),
                "-djfile", str(predictions / "dataset.json"), "-pfile", str(predictions / "plans.json"), "-np", "2")
    return [
        Step(f"adapt-{arm}", adapt),
        _training(f"finetune-{arm}", TARGET_ID, "0", FINETUNER, plan, device),
        Step(f"predict-{arm}", predict),
        Step(f"evaluate-{arm}", evaluate),
    ]


def _training(title, dataset, fold, trainer, plan, device):
    command = ("nnUNetv2_train", dataset, CONFIGURATION, fold, "-tr", trainer, "-p", plan, "-device", device)
    # without workers a small training is fastest; nnU-Net's planning fails on this value
    return Step(title, command, environment=(("nnUNet_n_proc_DA", "0"),))


def _assignments(plan):
    """The ``--set`` flag that makes the planned network narrow and the training short."""
    key = "architecture.arch_kwargs.features_per_stage"
    planned = plan["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["features_per_stage"]
    features = [min(width, FEATURES * 2**stage) for stage, width in enumerate(planned)]
    values = {f"configurations.{CONFIGURATION}.{key}": features} | SETTINGS
    return ["--set", *(f"{name}={value}".replace(" ", "") for name, value in values.items())]


def run(step: Step, logs: Path, *, number: int, environment: dict[str, str], say: Callable[[str], None]) -> None:
    """Show a command, run it, and keep its output in ``logs/NN-TITLE.log``.

    Raises:
        UserError: where the command is missing or fails, with the last line of its output and the log's path.
    """
    log = Path(logs, f"{number:02d}-{step.title}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    say(" ".join(["$", *(f"{name}={value}" for name, value in step.environment), shlex.join(step.command)]))
    executable = shutil.which(step.command[0], path=environment["PATH"])
    if executable is None:
        raise UserError(f"{step.command[0]} is not installed.", "Install the package again: pip install .")
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as output:
        finished = subprocess.run(
            [executable, *step.command[1:]],
            env=environment | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(
            f"Step '{step.title}' failed with exit code {finished.returncode}: {shlex.join(step.command)}\n"
            f"Last line of its output: {lines[-1] if lines else '(none)'}",
            f"Its whole output: {log}",
        )
    say(f"  done in {time.monotonic() - start:.0f} s")


def environment_for(folder, trainers):
    """The user's environment with nnU-Net's folders inside ``folder`` and without settings that break planning."""
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_n_proc_DA"}
    environment |= {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment |= {"nnUNet_extTrainer": trainers, "nnUNet_compile": "f", "nnUNet_def_n_proc": "2"}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    environment.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    return environment


def _dice(predictions):
    return read_json(predictions / "summary.json")["foreground_mean"]["Dice"]
