"""Fewer labels, on purpose: nested subsets of the training cases, as further folds of nnU-Net's own split file."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json

SPLITS_FILE = "splits_final.json"
SIDECAR_FILE = "label_fractions.json"


@dataclass(frozen=True)
class FractionFold:
    """What a fold with fewer labels is, as ``label_fractions.json`` records it."""

    fold: int  # its number, for nnUNetv2_train
    base_fold: int  # whose training cases were cut down, and whose validation cases it has
    fraction: float  # of the base fold's training cases
    seed: int
    training_cases: int
    validation_cases: int


def write_fraction_folds(dataset: str, *, fold: int = 0, fractions: Sequence[float], seed: int = 0) -> dict[float, int]:
    """Append one fold per fraction to the ``splits_final.json`` of a preprocessed dataset.

    A fold's training cases are a nested subset of those of ``fold`` (:func:`nested_subsets`), its validation cases are
    the same, so scores compare case by case. Folds that are there stay as they are; where there is no split file,
    nnU-Net's own five folds are made first, as its trainers make them. What was appended before is not appended again.
    Cases are what is drawn: several cases of one subject count as several.

    Args:
        dataset: ID or full name.
        fold: the fold whose training cases are cut down.
        fractions: in (0, 1].
        seed: of the draw.

    Returns:
        fraction to fold number, in the order of ``fractions``.

    Raises:
        UserError: the dataset, its cases or the fold are missing, a fraction is out of range, or the split file no
            longer holds what was appended to it.
    """
    from nnssl_plugin.nnunet.plans import dataset_folder

    folder = dataset_folder(dataset)
    splits = _read_or_create_splits(folder)
    if not 0 <= fold < len(splits):
        raise UserError(
            f"{folder / SPLITS_FILE} has no fold {fold}; it has {len(splits)}.",
            f"Name one of 0 to {len(splits) - 1} with -f.",
        )
    present = {(f.base_fold, f.fraction, f.seed): f for f in read_fraction_folds(folder)}
    added: list[FractionFold] = []
    for fraction, cases in nested_subsets(splits[fold]["train"], fractions, seed=seed).items():
        wanted = {"train": cases, "val": list(splits[fold]["val"])}
        known = present.get((fold, fraction, seed))
        if known is None:
            known = FractionFold(len(splits), fold, fraction, seed, len(cases), len(wanted["val"]))
            splits.append(wanted)
            added.append(known)
            present[fold, fraction, seed] = known
        elif known.fold >= len(splits) or splits[known.fold] != wanted:
            raise UserError(
                f"Fold {known.fold} of {folder / SPLITS_FILE} is not what {SIDECAR_FILE} says.",
                f"If the split file was made anew: rm {folder / SIDECAR_FILE}",
            )
    if added:
        write_json(folder / SPLITS_FILE, splits)
        write_json(folder / SIDECAR_FILE, [asdict(entry) for entry in present.values()])
    return {fraction: present[fold, fraction, seed].fold for fraction in fractions}


def read_fraction_folds(folder: str | Path) -> list[FractionFold]:
    """The folds with fewer labels of a preprocessed dataset; none where none were appended.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.
    """
    path = Path(folder) / SIDECAR_FILE
    return [FractionFold(**entry) for entry in read_json(path)] if path.is_file() else []


def nested_subsets(cases: Sequence[str], fractions: Iterable[float], *, seed: int = 0) -> dict[float, list[str]]:
    """Random subsets of cases, of which each holds every smaller one.

    All fractions cut one shuffled list, so a fraction's subset depends on the cases and the seed alone: neither the
    order of the cases nor the other fractions change it.

    Args:
        cases: names, each once.
        fractions: of the number of cases, in (0, 1]; rounded up, so at least one case is left.
        seed: shuffles the cases.

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
    shuffled = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    return {fraction: sorted(shuffled[: _count(fraction, len(ordered))]) for fraction in fractions}


def _count(fraction: float, total: int) -> int:
    # 0.7 * 10 is 7.000000000000001 in floating point, which would round up to 8
    return math.ceil(round(fraction * total, 9))


def _read_or_create_splits(folder: Path) -> list[dict[str, list[str]]]:
    path = folder / SPLITS_FILE
    if path.is_file():
        return read_json(path)
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
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    found = {}
    for data in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.pkl"))):
        found[data.name] = sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
    if not found:
        raise UserError(f"{folder} holds no preprocessed cases.", "Run: nnUNetv2_plan_and_preprocess -d ID")
    if len({tuple(cases) for cases in found.values()}) > 1:
        counts = ", ".join(f"{name}: {len(cases)}" for name, cases in found.items())
        raise UserError(
            f"The configurations in {folder} hold different cases ({counts}).",
            "Preprocess them all again: nnUNetv2_preprocess -d ID",
        )
    return next(iter(found.values()))
