"""A classification bed as one JSON file: what it says, which images it takes, and which of them each run sees."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from study_steps import FOLDERS, edit_command

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, read_class_labels
from nnssl_plugin.tasks.classification.folds import make_class_splits

HERE = Path(__file__).resolve().parent
PLAN = "bed"
SCRATCH = "scratch"
SHUFFLED, FROZEN, UNTRAINED = "shuffled labels", "frozen", "untrained"
Fold = dict[str, list[str]]
"""``train`` and ``val`` → names of cases, as in nnU-Net's ``splits_final.json``."""
Run = dict[str, Any]
"""What a run is: ``name``, ``arm``, ``seed``, ``fold`` (number), ``lr``, ``fraction`` (of the labels; None: for tuning)
and ``control`` (None, :data:`SHUFFLED` or :data:`FROZEN`). Its result has the same keys, and more."""


@dataclass(frozen=True)
class Pretraining:
    """One way to pretrain."""

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The plan's ``pretraining`` block, but its seed."""


@dataclass(frozen=True)
class Bed:
    """Everything that the file of a bed says."""

    name: str
    question: str
    data: str
    """Title and licence."""
    page: str
    """Where its results are told, from docs/results."""
    source: str
    """A name among ``SOURCES``, which knows how to lay the images out."""
    dataset: str
    """nnU-Net's name."""
    configuration: str
    plan: dict[str, Any]
    """Edits of nnU-Net's configuration, as ``nnssl_plugin plan --set`` takes them."""
    tuning: int
    """Labelled images on which learning rates are compared: of ``adrenal`` images that are nobody else's, of ``busi``
    a part of the images of each fold that are not held out."""
    fractions: tuple[float, ...]
    """Of the pool whose labels are used; the smaller are parts of the larger under one seed."""
    seeds: tuple[int, ...]
    pretrainings: dict[str, Pretraining]
    """Name of the arm → how it is pretrained, anew for each seed on the pool without labels."""
    rates: tuple[float, ...]
    """Learning rates, of which each arm takes the best on the images for tuning."""
    classification: dict[str, Any]
    """The plan's block of that name: inputs, epochs, steps and batch size of the fine-tuning."""
    shuffled: str | None = None
    """An arm that is trained once more per seed, on all labels dealt out at random."""
    frozen: bool = False
    """Whether a logistic regression is also fitted to the frozen encoders, untrained ones among them."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The pretrained ones, and from scratch."""
        return (*self.pretrainings, SCRATCH)

    @property
    def number(self) -> str:
        """Of the dataset."""
        return self.dataset[7:10]

    @property
    def preprocessed(self) -> Path:
        """nnU-Net's folder of plans and preprocessed cases."""
        return Path(os.environ["nnUNet_preprocessed"], self.dataset)


def read_bed(path: Path) -> Bed:
    """Read the file of a bed.

    Raises:
        KeyError: where it names a source or an arm that there is not.
        TypeError: where a field is missing or unknown.
    """
    found = read_json(path)
    found["pretrainings"] = {name: Pretraining(**block) for name, block in found["pretrainings"].items()}
    bed = Bed(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})
    if bed.source not in SOURCES:
        raise KeyError(f"{path}: there is no source {bed.source!r}; there are {', '.join(SOURCES)}.")
    if bed.shuffled not in (None, *bed.arms):
        raise KeyError(f"{path}: 'shuffled' names {bed.shuffled!r}, which is no arm ({', '.join(bed.arms)}).")
    return bed


# ---------------------------------------------------------------- images


class Images(NamedTuple):
    """What ``nnssl_plugin prepare`` takes."""

    scans: Path
    table: Path
    flags: tuple[str, ...] = ()


class Source(NamedTuple):
    """How the images of a bed are laid out, and which are held out."""

    images: Callable[[Path, Path], Images]
    """(what the user names, folder of the bed) → its images."""
    folds: Callable[[Bed, ClassLabels], dict[str, Fold]]
    """Name → fold, see :func:`fold_name`."""


def adrenal_images(archive: Path, folder: Path) -> Images:
    """Both official splits of AdrenalMNIST3D in one folder."""
    _run(sys.executable, HERE / "adrenal_data.py", "-i", archive, "-o", folder / "adrenal")
    scans, table = folder / "scans", folder / "scans.csv"
    scans.mkdir(exist_ok=True)
    lines = ["case,diagnosis"]
    for split, ending in (("train", ".nii.gz"), ("test", "_0000.nii.gz")):
        for path in (folder / "adrenal" / split).iterdir():
            path.rename(scans / f"{path.name.removesuffix(ending)}.nii.gz")
        lines += (folder / "adrenal" / f"{split}.csv").read_text().splitlines()[1:]
    table.write_text("\n".join(lines) + "\n")
    return Images(scans, table, ("--modality", "noNorm"))


def busi_images(source: Path, folder: Path) -> Images:
    """The folder of the PNG files as it is, and the table of their classes."""
    table = folder / "busi.csv"
    _run(sys.executable, HERE / "busi_data.py", "-i", source, "-o", table)
    return Images(source, table)


def prepare(bed: Bed, source: Path, folder: Path) -> None:
    """Images, table, plan, preprocessed cases and folds, unless they are there."""
    marker = folder / "folds.json"
    if marker.exists():
        return
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    scans, table, flags = SOURCES[bed.source].images(source, folder)
    name, configuration = bed.dataset[11:], bed.configuration
    plan = bed.plan | {"data_identifier": f"{PLAN}_{configuration}"}
    edits = {f"configurations.{configuration}.{key}": value for key, value in plan.items()}
    for command in (
        ("nnssl_plugin", "prepare", "-i", scans, "--class-labels", table, "-d", bed.number, "-n", name, *flags),
        ("nnUNetv2_plan_and_preprocess", "-d", bed.number, "-c", configuration, "-npfp", "2", "--no_pp"),
        edit_command(bed.number, "nnUNetPlans", PLAN, edits),
        ("nnUNetv2_preprocess", "-d", bed.number, "-plans_name", PLAN, "-c", configuration, "-np", "1"),
    ):
        _run(*command)
    folds = SOURCES[bed.source].folds(bed, read_class_labels(Path(os.environ["nnUNet_raw"], bed.dataset)))
    write_json(bed.preprocessed / "splits_final.json", list(folds.values()))
    write_json(marker, folds)


# ---------------------------------------------------------------- folds


def fold_name(seed: int, part: float | str) -> str:
    """``part``: a fraction of the labels, ``pool`` of the pretraining, or ``tuning``."""
    return f"{seed}-{part}"


def official_folds(bed: Bed, labels: ClassLabels) -> dict[str, Fold]:
    """The images of the official validation split are held out under every seed; those for tuning are the same too."""
    train = sorted(case for case in labels.cases if case.startswith("train"))
    evaluation = sorted(case for case in labels.cases if case.startswith("val"))
    order = np.random.default_rng(0).permutation(train).tolist()
    tuning, pool = order[: bed.tuning], sorted(order[bed.tuning :])
    few = round(min(bed.fractions) * len(pool))
    folds = {}
    for seed in bed.seeds:
        folds[fold_name(seed, "pool")] = {"train": pool, "val": sorted(tuning)}
        folds |= _drawn(bed, labels, seed, pool, evaluation)
    return folds | {fold_name(bed.seeds[0], "tuning"): {"train": sorted(tuning[:few]), "val": sorted(tuning[few:])}}


def rotating_folds(bed: Bed, labels: ClassLabels) -> dict[str, Fold]:
    """Each seed holds out another part of the images, so that each is held out once; the others are its pool."""
    parts = make_class_splits(labels, labels.cases, folds=len(bed.seeds))
    folds = {}
    for seed, part in zip(bed.seeds, parts, strict=True):
        pool, evaluation = part["train"], part["val"]
        folds[fold_name(seed, "pool")] = {"train": pool, "val": evaluation}
        folds |= _drawn(bed, labels, seed, pool, evaluation)
        order = stratified_order(pool, labels, np.random.default_rng([seed, 1]))
        tuning = {"train": sorted(order[bed.tuning :]), "val": sorted(order[: bed.tuning])}
        folds[fold_name(seed, "tuning")] = tuning
    return folds


def stratified_order(cases: Sequence[str], labels: ClassLabels, rng: np.random.Generator) -> list[str]:
    """The cases at random, such that every beginning holds each class nearly in its share."""
    (target,) = labels.targets
    of = labels.labels[target.name]
    mixed = rng.permutation(sorted(cases)).tolist()
    places = {}
    for label in sorted({of[case] for case in mixed}):
        own = [case for case in mixed if of[case] == label]
        places |= {case: (rank + 0.5) / len(own) for rank, case in enumerate(own)}
    return sorted(mixed, key=places.__getitem__)


def _drawn(bed: Bed, labels: ClassLabels, seed: int, pool: list[str], evaluation: list[str]) -> dict[str, Fold]:
    """The fold of each fraction under a seed."""
    order = stratified_order(pool, labels, np.random.default_rng(seed))
    return {
        fold_name(seed, part): {"train": sorted(order[: round(part * len(pool))]), "val": evaluation}
        for part in bed.fractions
    }


SOURCES = {
    "adrenal": Source(adrenal_images, official_folds),
    "busi": Source(busi_images, rotating_folds),
}


# ---------------------------------------------------------------- runs


def tuning_runs(bed: Bed, folds: Mapping[str, Fold]) -> list[list[Run]]:
    """For each fold for tuning its runs: every arm with every rate, once."""
    return [
        [
            _run_of(folds, arm, seed, "tuning", lr=lr, name=f"tune{seed}-{arm}-{lr:g}")
            for lr in bed.rates
            for arm in bed.arms
        ]
        for seed in bed.seeds
        if fold_name(seed, "tuning") in folds
    ]


def evaluation_runs(bed: Bed, folds: Mapping[str, Fold], rates: Mapping[str, Mapping[int, float]]) -> list[list[Run]]:
    """For each fraction and seed its runs: every arm, and with all labels the arm whose labels are shuffled.

    Args:
        bed: the bed.
        folds: by their names.
        rates: arm → seed → learning rate; a seed without one has that of the first seed.
    """
    groups = []
    for fraction, seed in itertools.product(sorted(bed.fractions), bed.seeds):
        of_arm = {arm: rates[arm].get(seed, rates[arm][bed.seeds[0]]) for arm in bed.arms}
        end = f"seed{seed}-{fraction:g}"
        runs = [_run_of(folds, arm, seed, fraction, lr=lr, name=f"{arm}-{end}") for arm, lr in of_arm.items()]
        if bed.shuffled and fraction == max(bed.fractions):
            run = _run_of(
                folds, bed.shuffled, seed, fraction, lr=of_arm[bed.shuffled], name=f"{bed.shuffled}-shuffled-{end}"
            )
            runs.append(run | {"control": SHUFFLED})
        groups.append(runs)
    return groups


def frozen_runs(bed: Bed, folds: Mapping[str, Fold]) -> list[list[Run]]:
    """For each seed, with all labels, the encoders of the pretrained arms and an untrained one."""
    if not bed.frozen:
        return []
    fraction = max(bed.fractions)
    return [
        [
            _run_of(folds, arm, seed, fraction, lr=None, name=f"{arm}-frozen-seed{seed}") | {"control": FROZEN}
            for arm in (*bed.pretrainings, UNTRAINED)
        ]
        for seed in bed.seeds
    ]


def best_rates(tuned: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Arm → seed → the learning rate of the highest AUROC among the results of :func:`tuning_runs`."""
    best: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in sorted(tuned, key=lambda run: run["lr"]):
        of_arm = best.setdefault(run["arm"], {})
        if run["seed"] not in of_arm or run["auroc"] > of_arm[run["seed"]]["auroc"]:
            of_arm[run["seed"]] = run
    return {arm: {seed: run["lr"] for seed, run in of_seed.items()} for arm, of_seed in best.items()}


def _run_of(folds: Mapping[str, Fold], arm: str, seed: int, part: float | str, *, lr: float | None, name: str) -> Run:
    fraction = None if part == "tuning" else part
    return {
        "name": name,
        "arm": arm,
        "seed": seed,
        "fold": list(folds).index(fold_name(seed, part)),
        "fraction": fraction,
        "lr": lr,
        "control": None,
    }


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)
