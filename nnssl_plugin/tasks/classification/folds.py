"""Folds for classification: stratified by class, and no subject on both sides of one."""

import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import LABELS_FILE, MULTILABEL, ClassLabels, read_class_labels
from nnssl_plugin.nnunet.splits import SPLITS_FILE, Splits, read_splits

FOLDS, SEED = 5, 12345
"""Those of nnU-Net's own folds."""

_log = logging.getLogger(__name__)


def class_splits(preprocessed_folder: Path, labels: ClassLabels, cases: Sequence[str]) -> Splits:
    """The folds of a dataset: those of its ``splits_final.json``, checked; or made, and written there.

    What is made holds the labelled cases alone, also for a segmentation of the same dataset.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.
        labels: of the dataset.
        cases: the labelled cases to split; cases of the file that are not among them are left out of what is returned
            (a segmentation dataset of which only some cases have class labels).

    Raises:
        UserError: the file cannot be read or lets a subject or case leak, or folds cannot be made.
    """
    path = Path(preprocessed_folder) / SPLITS_FILE
    if not path.is_file():
        splits = make_class_splits(labels, cases)
        write_json(path, splits)
        return splits
    wanted = set(cases)
    splits = [
        {part: [case for case in names if case in wanted] for part, names in fold.items()} for fold in read_splits(path)
    ]
    try:
        check_splits(splits, labels)
    except UserError as error:
        raise UserError(
            f"{path}: {error.problem}",
            f"Correct it, or have folds by subject made: rm {path} (folds trained before are then other cases).",
        ) from error
    return splits


def make_class_splits(labels: ClassLabels, cases: Sequence[str], *, folds: int = FOLDS, seed: int = SEED) -> Splits:
    """Stratified folds grouped by subject (scikit-learn's ``StratifiedGroupKFold``).

    One target with one class per case is stratified by it. Several targets, and multi-label ones, are stratified by
    the combination of labels; combinations that fewer subjects have than there are folds count as one.

    Args:
        labels: of the dataset.
        cases: which of its cases to split, in any order.
        folds: 2 or more.
        seed: shuffles the subjects.

    Returns:
        A list of ``{"train": [...], "val": [...]}`` with sorted names; every case is in one validation set.

    Raises:
        UserError: a case has no label, or there are fewer subjects than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    cases = sorted(cases)
    _check_labelled(cases, labels)
    groups = [labels.subjects[case] for case in cases]
    if len(set(groups)) < folds:
        raise UserError(
            f"{len(set(groups))} subjects are too few for {folds} folds.",
            f"Add cases of other subjects, or write {SPLITS_FILE} yourself.",
        )
    _, strata = np.unique(_strata(labels, cases, folds=folds), return_inverse=True)
    if np.bincount(strata).max() < folds:  # scikit-learn refuses to stratify classes that are all that rare
        strata = np.zeros_like(strata)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of rare classes, which are named below
        warnings.simplefilter("ignore", UserWarning)
        splits = [
            {"train": [cases[i] for i in train], "val": [cases[i] for i in val]}
            for train, val in splitter.split(cases, strata, groups)
        ]
    if not all(fold["val"] for fold in splits):
        raise UserError(
            f"{len(set(groups))} subjects cannot be divided into {folds} folds with these classes.",
            f"Add cases, or write {SPLITS_FILE} yourself.",
        )
    check_splits(splits, labels)
    _warn_of_absent_classes(splits, labels)
    return splits


def check_splits(splits: Splits, labels: ClassLabels) -> None:
    """Refuse folds in which a case or a subject is on both sides, or a side is empty.

    Raises:
        UserError: naming fold, subject and cases.
    """
    for number, fold in enumerate(splits):
        if not fold["train"] or not fold["val"]:
            side = "training" if not fold["train"] else "validation"
            raise UserError(f"Fold {number} has no {side} cases with a class label.", "Label some, or split anew.")
        _check_labelled([*fold["train"], *fold["val"]], labels)
        sides: dict[str, dict[str, str]] = defaultdict(dict)
        for part in ("train", "val"):
            for case in fold[part]:
                sides[labels.subjects[case]][part] = case
        leaks = sorted(subject for subject, found in sides.items() if len(found) == 2)
        if leaks:
            example = sides[leaks[0]]
            raise UserError(
                f"Fold {number} has subjects on both sides: {some(leaks)} (for example {leaks[0]}: "
                f"{example['train']} trains, {example['val']} validates).",
                "Put all cases of a subject on one side.",
            )


def dataset_class_splits(dataset: str) -> tuple[Splits, ClassLabels]:
    """Folds and labels of a preprocessed classification dataset; the folds are written where there are none.

    Args:
        dataset: ID or full name.

    Raises:
        UserError: it is not preprocessed, has no class labels, or its folds leak.
    """
    from nnssl_plugin.nnunet.plans import dataset_folder

    folder = dataset_folder(dataset)
    if "nnUNet_raw" not in os.environ:
        raise UserError("nnUNet_raw is not set; the class labels lie there.", "export nnUNet_raw=/path/to/nnUNet_raw")
    labels = read_class_labels(Path(os.environ["nnUNet_raw"], folder.name))
    return class_splits(folder, labels, labels.cases), labels


def has_class_labels(dataset: str) -> bool:
    """Whether a preprocessed dataset has a ``classification.csv`` in nnUNet_raw.

    Raises:
        UserError: it is not preprocessed.
    """
    from nnssl_plugin.nnunet.plans import dataset_folder

    return Path(os.environ.get("nnUNet_raw", ""), dataset_folder(dataset).name, LABELS_FILE).is_file()


def _strata(labels: ClassLabels, cases: Sequence[str], *, folds: int) -> list[str]:
    combined = {case: " | ".join(t.cell(labels.labels[t.name][case]) for t in labels.targets) for case in cases}
    if len(labels.targets) == 1 and labels.targets[0].kind != MULTILABEL:
        return [combined[case] for case in cases]
    subjects = Counter(stratum for stratum, _ in {(combined[case], labels.subjects[case]) for case in cases})
    return [combined[case] if subjects[combined[case]] >= folds else "" for case in cases]


def _warn_of_absent_classes(splits: Splits, labels: ClassLabels) -> None:
    for target in labels.targets:
        for index, name in enumerate(target.classes):
            having = set(labels.cases_of_class(target, index))
            without = {
                part: [n for n, fold in enumerate(splits) if not having & set(fold[part])] for part in ("train", "val")
            }
            for part, numbers in without.items():
                if numbers:
                    side = "training" if part == "train" else "validation"
                    _log.warning(
                        "%s: no case of class %s among the %s cases of fold %s.",
                        target.name,
                        name,
                        side,
                        ", ".join(map(str, numbers)),
                    )


def _check_labelled(cases: Sequence[str], labels: ClassLabels) -> None:
    without = sorted(set(cases) - set(labels.subjects))
    if without:
        raise UserError(f"No class label for {some(without)}.", "Add rows to classification.csv, or leave them out.")
