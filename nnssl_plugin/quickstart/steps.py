"""Lists the commands of the pipeline, the same that a user types, and what makes them short.

Unlabelled scans → dataset 501 → pretraining; labelled cases → dataset 502 → fine-tuning with the pretrained weights
and from scratch → predictions and their Dice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
MOST_PATCH_VOXELS = 32**3
"""A larger planned patch is cut down to this."""
SETTINGS = {
    "epochs": 4,
    "iterations_per_epoch": 10,
    "validation_iterations": 1,
    "lr": 1e-3,
    "figure_every": 1,
    "method.queries": 32,
    "method.dim": 64,
    "method.heads": 4,
    "finetuning.seed": 1,
    "finetuning.lr": 0.1,  # with nnU-Net's 0.01 a network as narrow as this finds no small label in so few steps
    "finetuning.epochs": 10,
    "finetuning.iterations_per_epoch": 25,
    "finetuning.validation_iterations": 2,
}
"""What makes the pipeline short: ``nnssl_plugin plan --set KEY=VALUE``."""

SECONDS = {
    "scans": 2, "prepare": 4, "plan": 28, "caption": 10, "shrink": 8, "pretrain": 36,
    "plan-target": 22, "move-plan": 2, "preprocess-target": 12,
    "adapt-pretrained": 5, "finetune-pretrained": 130, "predict-pretrained": 24, "evaluate-pretrained": 8,
    "adapt-scratch": 5, "finetune-scratch": 130, "predict-scratch": 24, "evaluate-scratch": 8,
    "report": 8,
}  # fmt: skip
"""Title of a step → about how long it takes on two CPU cores, in the order of the pipeline."""
LABELLED_FROM = "plan-target"
"""The first step that needs labels; without them the pipeline goes from pretraining straight to the report."""


@dataclass(frozen=True)
class Step:
    """One command of the pipeline."""

    title: str
    does: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    """Variables for this command alone."""
    results: Path | None = None
    """Folder in which a training leaves its checkpoints."""


def titles(*, labelled: bool) -> list[str]:
    """The titles of all steps in their order, ``scans`` and ``report``, which are no commands, among them."""
    every = list(SECONDS)
    return every if labelled else [*every[: every.index(LABELLED_FROM)], "report"]


def fold_folder(folder: Path, arm: str | None = None) -> Path:
    """Where a training leaves its checkpoints: of an arm of the fine-tuning, or of the pretraining."""
    results = folder / "nnUNet_results"
    if arm is None:
        return results / PRETRAINING / f"{PRETRAINER}__{SMALL_PLAN}__{CONFIGURATION}" / "fold_all"
    return results / TARGET / f"{FINETUNER}__{SMALL_PLAN}-{arm}__{CONFIGURATION}" / "fold_0"


def planning_steps(folder: Path, *, modality: str = "MR") -> list[Step]:
    """From scans to a planned and captioned dataset."""
    prepare = (
        "nnssl_plugin",
        "prepare",
        "-i",
        str(folder / "scans"),
        "-d",
        PRETRAINING_ID,
        "-n",
        PRETRAINING.partition("_")[2],
        "--modality",
        modality,
        "--keep",
    )
    # --clean: a fingerprint that an interruption left half-written is made anew
    plan = (
        "nnUNetv2_plan_and_preprocess",
        "-d",
        PRETRAINING_ID,
        "-c",
        CONFIGURATION,
        "--clean",
        "-npfp",
        "2",
        "-np",
        "2",
    )
    caption = ("nnssl_plugin", "caption", "-d", PRETRAINING_ID, "--captioner", "template")
    return [
        Step("prepare", "make an nnU-Net dataset of the unlabelled scans, with a body mask as its one label", prepare),
        Step("plan", "nnU-Net measures the scans, plans a network and preprocesses them", plan),
        Step("caption", "choose a slice of each scan, describe it, and store the frozen embeddings", caption),
    ]


def pretraining_steps(folder: Path, plan: Mapping[str, Any], *, device: str) -> list[Step]:
    """A small copy of the plan, and pretraining with it.

    Args:
        folder: the quickstart's folder.
        plan: content of the plan that nnU-Net made for the unlabelled dataset.
        device: ``cpu`` or ``cuda``.
    """
    shrink = (
        "nnssl_plugin",
        "plan",
        "-d",
        PRETRAINING_ID,
        "-p",
        STOCK_PLAN,
        "-n",
        SMALL_PLAN,
        "--overwrite",
        *_assignments(plan),
    )
    return [
        Step("shrink", "copy the plan with a narrow network and few epochs", shrink),
        _training(
            "pretrain",
            "pretrain on the unlabelled scans",
            (PRETRAINING_ID, "all"),
            SMALL_PLAN,
            device,
            fold_folder(folder),
        ),
    ]


def finetuning_steps(folder: Path, *, device: str) -> list[Step]:
    """The labelled dataset under the same plan, and both arms of fine-tuning."""
    plan = ("nnUNetv2_plan_and_preprocess", "-d", TARGET_ID, "--clean", "-npfp", "2", "--no_pp")
    move = (
        "nnUNetv2_move_plans_between_datasets",
        "-s",
        PRETRAINING_ID,
        "-t",
        TARGET_ID,
        "-sp",
        SMALL_PLAN,
        "-tp",
        SMALL_PLAN,
    )
    preprocess = ("nnUNetv2_preprocess", "-d", TARGET_ID, "-plans_name", SMALL_PLAN, "-c", CONFIGURATION, "-np", "2")
    steps = [
        Step("plan-target", "nnU-Net measures the labelled cases", plan),
        Step("move-plan", "give them the plan of the pretraining, so that both have the same network", move),
        Step("preprocess-target", "preprocess them under this plan", preprocess),
    ]
    for arm in ARMS:
        steps += _arm_steps(folder, arm, fold_folder(folder) / "checkpoint_final.pth", device)
    return steps


def fitting_patch(patch: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """A patch of at most :data:`MOST_PATCH_VOXELS` that the network's strides divide, cut at its longest axes.

    Args:
        patch: planned size in voxels, divisible by the product of the strides.
        strides: of each stage, along each axis.

    Returns:
        the size; each axis keeps at least two voxels at the deepest stage, as the normalisation there needs.
    """
    divisors = [math.prod(axis) for axis in zip(*strides, strict=True)]
    size = list(patch)
    while math.prod(size) > MOST_PATCH_VOXELS:
        shrinkable = [axis for axis, divisor in enumerate(divisors) if size[axis] - divisor >= 2 * divisor]
        if not shrinkable:
            break
        longest = max(shrinkable, key=lambda axis: size[axis])
        size[longest] -= divisors[longest]
    return size


def _arm_steps(folder, arm, weights, device):
    """Adapt, fine-tune, predict and evaluate."""
    target, predictions = folder / "nnUNet_raw" / TARGET, folder / "predictions" / arm
    plan = f"{SMALL_PLAN}-{arm}"
    adapt = (
        "nnssl_plugin",
        "adapt",
        "-d",
        TARGET_ID,
        "-w",
        str(weights),
        "-c",
        CONFIGURATION,
        "-p",
        SMALL_PLAN,
        "-n",
        arm,
        *(["--from-scratch"] if arm == "scratch" else []),
    )
    predict = (
        "nnUNetv2_predict",
        "-i",
        str(target / "imagesTs"),
        "-o",
        str(predictions),
        "-d",
        TARGET_ID,
        "-c",
        CONFIGURATION,
        "-f",
        "0",
        "-tr",
        FINETUNER,
        "-p",
        plan,
        "-device",
        device,
        "-step_size",
        "0.5",
        "--disable_tta",
        "--save_probabilities",
        "-npp",
        "1",
        "-nps",
        "1",
    )
    evaluate = (
        "nnUNetv2_evaluate_folder",
        str(target / "labelsTs"),
        str(predictions),
        "-djfile",
        str(predictions / "dataset.json"),
        "-pfile",
        str(predictions / "plans.json"),
        "-np",
        "2",
    )
    start = "the pretrained weights" if arm == "pretrained" else "random weights, on the same schedule"
    return [
        Step(f"adapt-{arm}", f"write the plan that fine-tunes from {start}", adapt),
        _training(
            f"finetune-{arm}", f"fine-tune from {start}", (TARGET_ID, "0"), plan, device, fold_folder(folder, arm)
        ),
        Step(f"predict-{arm}", "predict the test cases, which neither training has seen", predict),
        Step(f"evaluate-{arm}", "Dice of each test case", evaluate),
    ]


def _training(title, does, dataset_and_fold, plan, device, results):
    dataset, fold = dataset_and_fold
    trainer = PRETRAINER if fold == "all" else FINETUNER
    command = ("nnUNetv2_train", dataset, CONFIGURATION, fold, "-tr", trainer, "-p", plan, "-device", device)
    # without workers a small training is fastest; nnU-Net's planning fails on this value
    return Step(title, does, command, environment=(("nnUNet_n_proc_DA", "0"),), results=results)


def _assignments(plan):
    """The ``--set`` flag that makes the planned network narrow, the patch small and the training short."""
    under = f"configurations.{CONFIGURATION}"
    configuration = plan["configurations"][CONFIGURATION]
    network = configuration["architecture"]["arch_kwargs"]
    planned = network["features_per_stage"]
    values = {
        f"{under}.architecture.arch_kwargs.features_per_stage":
            [min(width, FEATURES * 2**stage) for stage, width in enumerate(planned)],
        f"{under}.patch_size": fitting_patch(configuration["patch_size"], network["strides"]),
        f"{under}.batch_size": 2,
        **SETTINGS,
    }  # fmt: skip
    return ["--set", *(f"{name}={value}".replace(" ", "") for name, value in values.items())]
