"""A study of label efficiency as one JSON file: what it says, and which cases it takes."""

import dataclasses
import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.label_fractions import nested_subsets

ENDING = ".nii.gz"
SCRATCH = "scratch"
"""Stands for random weights where the name of a pretraining does."""
SHIFTED = "-shifted"
"""What the name of an evaluation case with another look ends in."""
CASE = "{case}"
"""Stands for the name of a case in a pattern of files."""
CAPTION_FLAGS = ("captioner", "slices", "body-part", "seed", "weights", "model")
"""Flags of ``nnssl_plugin caption`` that a study may set."""
CLIP_FLAGS = ("weights", "model", "epochs", "lr", "batch-size", "patience", "holdout", "seed")
"""Flags of ``nnssl_plugin clip`` that a study may set."""


@dataclass(frozen=True)
class Data:
    """The scans and labels; folders and patterns are relative to the folder of data."""

    title: str
    licence: str
    label_kind: str
    """Who made the labels: expert, model output, phantom."""
    images: str
    """A folder of ``CASE.nii.gz``, or a pattern of files such as ``scans/{case}/MR.nii.gz``."""
    labels: str
    """The same of the labels."""
    label_names: tuple[str, ...]
    """Names of the values 1, 2, …"""
    modality: str = "MR"


@dataclass(frozen=True)
class Counts:
    """Numbers of cases."""

    unlabelled: int
    """Scans for pretraining; the labelled pool is among them."""
    pool: int
    """Cases with labels; a fraction of 1 trains on all of them."""
    evaluation: int
    """Cases that are segmented in the end; neither pretraining nor fine-tuning sees them."""
    tuning: int = 0
    """Further cases, on which each arm's recipe is chosen: some are trained on, the others segmented; pretraining does
    not see them."""


@dataclass(frozen=True)
class Pretraining:
    """One way to pretrain."""

    trainer: str
    preset: str | None = None
    edits: dict[str, Any] = field(default_factory=dict)
    """Keys and values for ``nnssl_plugin plan --set``."""


@dataclass(frozen=True)
class Arm:
    """One line of the comparison."""

    name: str
    pretraining: str | None
    """A name among the study's pretrainings; ``null`` is from scratch."""
    finetuning: dict[str, Any] = field(default_factory=dict)
    """Settings of the fine-tuning that this arm alone has."""


@dataclass(frozen=True)
class Separation:
    """How the features of each pretraining are probed: ``nnssl_plugin evaluate tokens`` on the evaluation cases."""

    stride: int
    """Size of a token in voxels of the plan's spacing."""


@dataclass(frozen=True)
class Probe:
    """How the frozen encoder of each pretraining is read: ``nnssl_plugin evaluate probe`` on the tuning cases."""

    labelled: int
    """Of the tuning cases that are trained on, drawn anew for each seed; the others of the tuning are scored."""
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Shift:
    """Another look of the evaluation cases: what a scanner with other settings would have made of them."""

    gamma: float
    """Exponent of the intensities between the 0.5th and the 99.5th percentile of a scan, brought to [0, 1]."""
    coarser: int
    """Voxels are averaged over so many along each axis, and interpolated back to the grid."""


@dataclass(frozen=True)
class Study:
    """Everything that a study file says."""

    name: str
    question: str
    data: Data
    cases: Counts
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    pretrainings: dict[str, Pretraining]
    arms: tuple[Arm, ...]
    plan: dict[str, Any] = field(default_factory=dict)
    """Keys under ``configurations`` and values, for the plan that both datasets share."""
    finetuning: dict[str, Any] = field(default_factory=dict)
    """Settings of the plan's ``finetuning`` block, for every arm."""
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name → settings of the fine-tuning; each arm takes the best of them on the tuning cases."""
    schedules: tuple[int, ...] = ()
    """Numbers of epochs of further, shorter trainings: how soon does an arm reach the twin's result?"""
    shift: Shift | None = None
    """With it, the evaluation cases are segmented a second time, with another look."""
    mirroring: bool = True
    """Whether predictions are averaged over mirrored inputs, as nnU-Net does; without, they cost an eighth."""
    captions: dict[str, Any] | None = None
    """Flags of ``nnssl_plugin caption``, for methods that need triplets."""
    clip: dict[str, Any] | None = None
    """With it, a pair of encoders is trained on slices and captions: flags of ``nnssl_plugin clip``."""
    separation: Separation | None = None
    """With it, token separation by label is measured before and after each pretraining."""
    probe: Probe | None = None
    """With it, a linear readout of each pretraining's frozen encoder is measured on the tuning cases."""
    configuration: str = "3d_fullres"
    pretraining_seeds: int = 1
    """Trainings of each pretraining, with the seeds 0, 1, …; fine-tunings with another seed start from another one."""

    @property
    def trained(self) -> dict[str, Pretraining]:
        """Name → every training of the pretrainings; several of one pretraining differ in their seed."""
        if self.pretraining_seeds == 1:
            return self.pretrainings
        return {
            f"{name}-{seed}": dataclasses.replace(each, edits=each.edits | {"seed": seed})
            for name, each in self.pretrainings.items()
            for seed in range(self.pretraining_seeds)
        }

    def start(self, arm: Arm, seed: int) -> str:
        """Name of what a fine-tuning starts from: one of :attr:`trained`, or random weights."""
        if arm.pretraining is None:
            return SCRATCH
        return arm.pretraining if self.pretraining_seeds == 1 else f"{arm.pretraining}-{seed % self.pretraining_seeds}"

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with: the first from scratch."""
        return next(arm for arm in self.arms if arm.pretraining is None)

    @property
    def folds(self) -> list[tuple[int, float]]:
        """Seed and fraction of each fold of ``splits_final.json``, in order; behind them comes that of the tuning."""
        return [(seed, fraction) for seed in self.seeds for fraction in self.fractions]

    @property
    def largest(self) -> float:
        """The largest fraction: that of the tuning and of the short schedules."""
        return max(self.fractions)


@dataclass(frozen=True)
class Selection:
    """Names of the cases, sorted; the pool is a part of the unlabelled ones, the others overlap with nothing."""

    unlabelled: tuple[str, ...]
    pool: tuple[str, ...]
    evaluation: tuple[str, ...]
    tuning: tuple[str, ...] = ()


def read_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: for a missing or unknown key, or values that do not hold together.
    """
    content = read_json(path)
    study = build(Study, content, where=f"{path}")
    study = dataclasses.replace(
        study,
        data=build(Data, study.data, where=f"{path}, data"),
        cases=build(Counts, study.cases, where=f"{path}, cases"),
        pretrainings={
            name: build(Pretraining, block, where=f"{path}, pretrainings, {name}")
            for name, block in study.pretrainings.items()
        },
        arms=tuple(build(Arm, arm, where=f"{path}, arms") for arm in study.arms),
        separation=study.separation and build(Separation, study.separation, where=f"{path}, separation"),
        shift=study.shift and build(Shift, study.shift, where=f"{path}, shift"),
        probe=study.probe and build(Probe, study.probe, where=f"{path}, probe"),
        fractions=tuple(sorted(study.fractions)),
        seeds=tuple(study.seeds),
    )
    for fits, problem in _requirements(study):
        if not fits:
            raise UserError(f"{path}: {problem}.", "docs/how-to/measure-label-efficiency.md describes the file.")
    return study


def choose_cases(study: Study, data: Path) -> Selection:
    """Choose the cases of a study evenly over their sorted names, so that the choice is always the same.

    Args:
        study: the study.
        data: the folder that the study's images and labels are relative to.

    Raises:
        UserError: when there are fewer cases with image and label than the study needs.
    """
    images, labels = study.data.images, study.data.labels
    names = sorted(files_by_case(data, images).keys() & files_by_case(data, labels).keys())
    counts = study.cases
    if len(names) < counts.unlabelled + counts.evaluation + counts.tuning:
        raise UserError(
            f"{data / images} and {data / labels} hold {len(names)} cases; the study needs "
            f"{counts.unlabelled} unlabelled and {counts.evaluation + counts.tuning} others for evaluation and tuning.",
            "Name the folder of data with --data.",
        )
    evaluation = evenly(names, counts.evaluation)
    others = [name for name in names if name not in set(evaluation)]
    tuning = evenly(others, counts.tuning)
    unlabelled = evenly([name for name in others if name not in set(tuning)], counts.unlabelled)
    return Selection(unlabelled, evenly(unlabelled, counts.pool), evaluation, tuning)


def files_by_case(data: Path, place: str) -> dict[str, Path]:
    """The files of a study's images or labels by the names of their cases.

    Args:
        data: the folder that ``place`` is relative to.
        place: a folder of ``CASE.nii.gz``, or a pattern with ``{case}``.
    """
    pattern = place if CASE in place else f"{place}/{CASE}{ENDING}"
    before, _, after = str(data / pattern).partition(CASE)
    found = glob.glob(f"{glob.escape(before)}*{glob.escape(after)}")
    return {path[len(before) : -len(after)]: Path(path) for path in found}


def split_folds(study: Study, selection: Selection) -> list[dict[str, list[str]]]:
    """nnU-Net's ``splits_final.json``: a fold for each seed and fraction, and one for the tuning, where there is any.

    The pseudo Dice of a training is that of the tuning cases that nothing trains on; without tuning, of the evaluation.
    """
    subsets = {seed: nested_subsets(selection.pool, study.fractions, seed=seed) for seed in study.seeds}
    trained, scored = tuning_cases(study, selection)
    folds = [
        {"train": list(subsets[seed][fraction]), "val": list(scored or selection.evaluation)}
        for seed, fraction in study.folds
    ]
    return [*folds, {"train": list(trained), "val": list(scored)}] if scored else folds


def tuning_cases(study: Study, selection: Selection) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the tuning cases those that are trained on, as many as in the largest fraction, and those that are scored."""
    if not selection.tuning:
        return (), ()
    number = len(nested_subsets(selection.pool, [study.largest])[study.largest])
    trained = nested_subsets(selection.tuning, [number / len(selection.tuning)])[number / len(selection.tuning)]
    return tuple(trained), tuple(case for case in selection.tuning if case not in trained)


def evenly(names, count: int) -> tuple[str, ...]:
    return tuple(names[index * len(names) // count] for index in range(count))


def build(kind: type, content: Any, *, where: str) -> Any:
    """An instance of a dataclass from JSON, lists as tuples where the field is one."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} is {content!r}, not a block of values.", "See benchmarks/studies for examples.")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = [key for key in content if key not in known]
    missing = [
        name
        for name, entry in known.items()
        if name not in content and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        wrong = f"the unknown key '{unknown[0]}'" if unknown else f"no '{missing[0]}'"
        raise UserError(f"{where} has {wrong}.", f"Its keys are: {', '.join(known)}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


def _requirements(study: Study) -> list[tuple[bool, str]]:
    """What must hold, and what to say where it does not."""
    names = [*study.pretrainings, *study.recipes, *(arm.name for arm in study.arms), study.name]
    settings = [study.finetuning, *study.recipes.values(), *(arm.finetuning for arm in study.arms)]
    bad_name = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*", name)), None)
    lost = next((arm for arm in study.arms if arm.pretraining not in (None, *study.pretrainings)), None)
    counts = study.cases
    return [
        (bad_name is None, f"the name '{bad_name}' may hold letters, digits and single '-' and '_' only"),
        (lost is None, f"the pretraining of an arm, '{lost and lost.pretraining}', is not among pretrainings"),
        (any(arm.pretraining is None for arm in study.arms), 'no arm is from scratch ("pretraining": null)'),
        (len({arm.name for arm in study.arms}) == len(study.arms), "two arms have one name"),
        (SCRATCH not in study.pretrainings, f"a pretraining cannot be called {SCRATCH}"),
        (
            len(study.recipes) < 2 or counts.tuning > counts.pool * max(study.fractions, default=0),
            "several recipes need tuning cases: more than the largest number of labels, as the others are scored",
        ),
        (
            1 <= counts.pool <= counts.unlabelled and counts.evaluation >= 1,
            "cases must have 1 <= pool <= unlabelled and evaluation >= 1",
        ),
        (
            len(study.fractions) > 0 and all(0 < fraction <= 1 for fraction in study.fractions),
            "fractions must lie in (0, 1]",
        ),
        (len(study.seeds) > 0 and len(set(study.seeds)) == len(study.seeds), "seeds must be given, each once"),
        (study.probe is None or study.cases.tuning > 0, "probe needs cases for tuning"),
        (study.pretraining_seeds >= 1, "pretraining_seeds must be at least 1"),
        (
            all(key.startswith("configurations.") for key in study.plan),
            "keys of plan must begin with 'configurations.'",
        ),
        (
            not any("seed" in block for block in settings),
            "the seed of the fine-tuning comes from seeds",
        ),
        (
            all(
                place.count(CASE) <= 1 and (CASE not in place or place.endswith(ENDING))
                for place in (study.data.images, study.data.labels)
            ),
            f"a pattern of files holds {CASE} once and ends in {ENDING}",
        ),
        (
            study.captions is None or set(study.captions) <= set(CAPTION_FLAGS),
            f"captions may hold {', '.join(CAPTION_FLAGS)}",
        ),
        (study.clip is None or study.captions is not None, "clip needs captions"),
        (study.clip is None or set(study.clip) <= set(CLIP_FLAGS), f"clip may hold {', '.join(CLIP_FLAGS)}"),
    ]
