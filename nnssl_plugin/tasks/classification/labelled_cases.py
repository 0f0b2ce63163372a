"""From a plan and its folders to the labelled cases of a fold, and what the loss and the log need to know of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target, read_class_labels
from nnssl_plugin.nnunet.raw_folders import raw_folder
from nnssl_plugin.tasks.classification.batches import label_matrix
from nnssl_plugin.tasks.classification.folds import class_splits
from nnssl_plugin.tasks.classification.losses import balanced_weights


def read_labels(plans: Mapping[str, Any]) -> ClassLabels:
    """The class labels of a plan's dataset.

    Raises:
        UserError: it has none, or they cannot be used.
    """
    return read_class_labels(raw_folder(plans["dataset_name"]))


def cases_of_fold(
    labels: ClassLabels, fold: int | str, *, dataset_folder: str | Path, cases_folder: str | Path
) -> tuple[list[str], list[str]]:
    """Names of the training and validation cases: labelled and preprocessed; with fold ``all`` both are all of them.

    Args:
        labels: of the dataset.
        fold: number or ``all``.
        dataset_folder: ``nnUNet_preprocessed/DATASET``, where the folds are written.
        cases_folder: of the configuration's preprocessed cases.

    Raises:
        UserError: no case is both labelled and preprocessed, or there is no such fold.
    """
    present = set(infer_dataset_class(str(cases_folder)).get_identifiers(str(cases_folder)))
    cases = [case for case in labels.cases if case in present]
    if not cases:
        raise UserError(
            f"No case of {cases_folder} has a class label (labelled are {', '.join(labels.cases[:3])} …).",
            "Preprocess the labelled cases, or correct the column 'case' of classification.csv.",
        )
    if fold == "all":
        return cases, cases
    splits = class_splits(Path(dataset_folder), labels, cases)
    if not 0 <= int(fold) < len(splits):
        raise UserError(
            f"There is no fold {fold}; {dataset_folder} has {len(splits)} folds.",
            f"Train one of 0 to {len(splits) - 1}, or all.",
        )
    chosen = splits[int(fold)]
    return chosen["train"], chosen["val"]


def loss_weights(labels: ClassLabels, targets: Sequence[Target], cases: Sequence[str]) -> list[Tensor]:
    """``balanced_weights`` of each target over these cases."""
    return [
        balanced_weights(
            torch.from_numpy(label_matrix(labels, target, cases)), kind=target.kind, classes=len(target.classes)
        )
        for target in targets
    ]


def frequencies(labels: ClassLabels, target: Target, cases: Sequence[str]) -> str:
    """How many of these cases have each class, for the log."""
    among = set(cases)
    counts = (
        f"{name} {len(among.intersection(labels.cases_of_class(target, index)))}"
        for index, name in enumerate(target.classes)
    )
    return ", ".join(counts)
