"""Fewer labels, on purpose: nested subsets of the training cases, as further folds of nnU-Net's own split file."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.splits import SPLITS_FILE, Splits, check_fold, read_splits
from nnssl_plugin.nnunet.subjects import raw_folder_if_there, subjects_of_cases

SIDECAR_FILE = "label_fractions.json"
CASES, SUBJECTS = "cases", "subjects"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FractionFold:
    """What a fold with fewer labels is, as ``label_fractions.json`` records it."""

    fold: int  # its number, for nnUNetv2_train
    base_fold: int  # whose training cases were cut down, and whose validation cases it has
    fraction: float  # of the base fold's training cases
    seed: int
    training_cases: int
    validation_cases: int
    drawn: str = CASES  # or SUBJECTS, where a subject of the fold has several cases


def write_fraction_folds(
    dataset: str, *, fold: int = 0, fractions: Sequence[float], seed: int = 0, subjects: str | Path | None = None
) -> dict[float, int]:
    """Append one fold per fraction to the ``splits_final.json`` of a preprocessed dataset.

    A fold's training cases are a nested subset of those of ``fold`` (:func:`nested_subsets`), its validation cases are
    the same, so scores compare case by case. Folds that are there stay as they are; where there is no split file,
    nnU-Net's own five folds are made first, as its trainers make them. What was appended before is not appended again.
    Subjects are drawn with all of their cases.

    Args:
        dataset: ID or full name.
        fold: the fold whose training cases are cut down.
        fractions: in (0, 1].
        seed: of the draw.
        subjects: table ``case,subject``; None: ``classification.csv`` of the raw dataset, and without that each case
            is its own subject.

    Returns:
        fraction to fold number, in the order of ``fractions``.

    Raises:
        UserError: the dataset, its cases or the fold are missing, the fold's cases are unknown or on both sides, a
            fraction is out of range, or the split file no longer holds what was appended to it.
    """
    from nnssl_plugin.nnunet.plans import dataset_folder

    folder = dataset_folder(dataset)
    splits = _read_or_create_splits(folder)
    if not 0 <= fold < len(splits):
        raise UserError(
            f"{folder / SPLITS_FILE} has no fold {fold}; it has {len(splits)}.",
            f"Name one of 0 to {len(splits) - 1} with -f.",
        )
    base = splits[fold]
    check_fold(base, known=_cases_of_any_configuration(folder), where=f"{folder / SPLITS_FILE}: fold {fold}")
    subject_of = subjects_of_cases(
        [*base["train"], *base["val"]], table=subjects, raw_folder=raw_folder_if_there(folder.name)
    )
    _warn_of_shared_subjects(base, subject_of, fold)
    drawn = SUBJECTS if len({subject_of[case] for case in base["train"]}) < len(base["train"]) else CASES
    present = {(f.base_fold, f.fraction, f.seed, f.drawn): f for f in read_fraction_folds(folder)}
    added: list[FractionFold] = []
    subsets = nested_subsets(base["train"], fractions, seed=seed, subjects=subject_of)
    for fraction, cases in subsets.items():
        wanted = {"train": cases, "val": list(base["val"])}
        known = present.get((fold, fraction, seed, drawn))
        if known is None:
            known = FractionFold(len(splits), fold, fraction, seed, len(cases), len(wanted["val"]), drawn)
            splits.append(wanted)
            added.append(known)
            present[fold, fraction, seed, drawn] = known
        elif known.fold >= len(splits) or splits[known.fold] != wanted:
            raise UserError(
                f"Fold {known.fold} of {folder / SPLITS_FILE} is not what {SIDECAR_FILE} says.",
                f"If the split file was made anew: rm {folder / SIDECAR_FILE}",
            )
    if added:
        write_json(folder / SPLITS_FILE, splits)
        write_json(folder / SIDECAR_FILE, [asdict(entry) for entry in present.values()])
    return {fraction: present[fold, fraction, seed, drawn].fold for fraction in fractions}


def read_fraction_folds(folder: str | Path) -> list[FractionFold]:
    """The folds with fewer labels of a preprocessed dataset; none where none were appended.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.

    Raises:
        UserError: the record is damaged.
    """
    path = Path(folder) / SIDECAR_FILE
    if not path.is_file():
        return []
    try:
        return [FractionFold(**entry) for entry in read_json(path, list)]
    except TypeError as error:
        raise UserError(f"{path} is no record of folds with fewer labels: {error}.", f"rm {path}") from error


def nested_subsets(
    cases: Sequence[str], fractions: Iterable[float], *, seed: int = 0, subjects: Mapping[str, str] | None = None
) -> dict[float, list[str]]:
    """Random subsets of cases, of which each holds every smaller one and all cases of each of its subjects.

    All fractions cut one shuffled list of subjects, so a fraction's subset depends on the cases, their subjects and the
    seed alone: neither the order of the cases nor the other fractions change it.

    Args:
        cases: names, each once.
        fractions: of the number of cases, in (0, 1]; rounded up, so at least one case is left. Subjects are taken until
            so many cases are reached.
        seed: shuffles the subjects.
        subjects: case → subject; None: each case is its own.

    Returns:
        fraction to sorted names, in the order of ``fractions``.

    Raises:
        UserError: there is no case, a case occurs twice, or a fraction is out of range.
    """
    ordered, fractions = sorted(cases), list(fractions)
    if not ordered or len(set(ordered)) != len(ordered):
        raise UserError(f"{len(ordered)} training cases, {len(set(ordered))} of them different.", "Name each once.")
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong:
        raise UserError(
            f"A fraction of the cases is above 0 and at most 1 (100 %), not {wrong[0]:g}.",
            "For example: --fractions 20 40 60 80 100",
        )
    of_subject: dict[str, list[str]] = {}
    for case in ordered:
        of_subject.setdefault(subjects[case] if subjects else case, []).append(case)
    groups = list(of_subject.values())
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    reached = np.cumsum([len(group) for group in shuffled])
    taken = {f: int(np.searchsorted(reached, _count(f, len(ordered)))) + 1 for f in fractions}
    return {f: sorted(case for group in shuffled[:number] for case in group) for f, number in taken.items()}


def _warn_of_shared_subjects(fold: Mapping[str, list[str]], subject_of: Mapping[str, str], number: int) -> None:
    training, validation = ({subject_of[case] for case in fold[part]} for part in ("train", "val"))
    shared = sorted(training & validation)
    if shared:
        _log.warning("Fold %d trains and validates on cases of the same subjects: %s.", number, some(shared))


def _count(fraction: float, total: int) -> int:
    # 0.7 * 10 is 7.000000000000001 in floating point, which would round up to 8
    return math.ceil(round(fraction * total, 9))


def _read_or_create_splits(folder: Path) -> Splits:
    path = folder / SPLITS_FILE
    if path.is_file():
        return read_splits(path)
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases = _preprocessed_cases(folder)
    if len(cases) < 5:
        raise UserError(
            f"{folder} holds {len(cases)} cases, too few for nnU-Net's five folds.",
            f'Write {path} yourself: a list of {{"train": [...], "val": [...]}}.',
        )
    # the seed and the number of folds are those of nnUNetTrainer.do_split; names lose NumPy's string type
    splits = [
        {part: [str(case) for case in fold[part]] for part in ("train", "val")}
        for fold in generate_crossval_split(cases, seed=12345, n_splits=5)
    ]
    write_json(path, splits)
    return splits


def _preprocessed_cases(folder: Path) -> list[str]:
    """Sorted names of the cases that nnU-Net's trainers would split."""
    found = _cases_of_configurations(folder)
    if not found:
        raise UserError(f"{folder} holds no preprocessed cases.", "Run: nnUNetv2_plan_and_preprocess -d ID")
    if len({tuple(cases) for cases in found.values()}) > 1:
        counts = ", ".join(f"{name}: {len(cases)}" for name, cases in found.items())
        raise UserError(
            f"The configurations in {folder} hold different cases ({counts}).",
            "Preprocess them all again: nnUNetv2_preprocess -d ID",
        )
    return next(iter(found.values()))


def _cases_of_any_configuration(folder: Path) -> set[str] | None:
    """Names of all preprocessed cases; None where nothing is preprocessed yet."""
    found = _cases_of_configurations(folder)
    return set().union(*found.values()) if found else None


def _cases_of_configurations(folder: Path) -> dict[str, list[str]]:
    """Folder of preprocessed cases → their sorted names."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    return {
        data.name: sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
        for data in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.pkl")))
    }
