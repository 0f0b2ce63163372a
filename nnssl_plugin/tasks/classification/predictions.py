"""The table of a classifier's predictions: one row per case, with the probability of every class."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import MULTILABEL, Label, Target, read_table, subject_of

THRESHOLD = 0.5
"""From this probability on a class of a multi-label target counts as predicted."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities of N cases and what is true of them."""

    target: Target
    cases: tuple[str, ...]
    subjects: tuple[str, ...]
    labels: np.ndarray  # (N,) class index; (N, K) bool where the target is multi-label
    probabilities: np.ndarray  # (N, K) in [0, 1]
    checkpoint: str = ""
    """``final`` or ``best`` (see ``checkpoints``); empty where it is not known."""

    def select(self, rows: Sequence[int]) -> "Predictions":
        """The rows with these indices, in this order."""
        rows = list(rows)
        return replace(
            self,
            cases=tuple(self.cases[i] for i in rows),
            subjects=tuple(self.subjects[i] for i in rows),
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
        )


def name_suffix(target: Target, targets: Sequence[Target] = ()) -> str:
    """What tells the files of one of several targets apart, ``_TARGET``; empty where there is one."""
    return f"_{target.name.replace(' ', '_')}" if len(targets) > 1 else ""


def make_predictions(
    target: Target,
    cases: Sequence[str],
    subjects: Sequence[str],
    labels,
    probabilities,
    *,
    checkpoint: str = "",
) -> Predictions:
    """Checked predictions.

    Args:
        target: what was predicted.
        cases: N names.
        subjects: of the cases.
        labels: N class indices; for a multi-label target (N, K) indicators or N tuples of class indices.
        probabilities: (N, K) in [0, 1].
        checkpoint: see :class:`Predictions`.

    Raises:
        UserError: there is no case, numbers do not belong together, or a probability is NaN or out of range.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    labels = label_array(labels, target)
    numbers = (len(cases), len(subjects), len(labels), len(probabilities))
    if not numbers[0] or len(set(numbers)) > 1 or probabilities.shape[1:] != (len(target.classes),):
        raise UserError(
            f"{target.name}: cases, subjects and labels: {numbers[:3]}; probabilities: {probabilities.shape}.",
            f"Each case has a subject, a label and {len(target.classes)} probabilities.",
        )
    # single precision sums to a little more than one
    wrong = ~((probabilities >= -1e-6) & (probabilities <= 1 + 1e-6)).all(axis=1)
    if wrong.any():
        raise UserError(
            f"{target.name}: {int(wrong.sum())} cases have a probability that is NaN or outside 0 to 1, "
            f"for example {cases[int(np.flatnonzero(wrong)[0])]}.",
            "The training has diverged: train again with a smaller learning rate (classification.lr).",
        )
    return Predictions(target, tuple(cases), tuple(subjects), labels, probabilities.clip(0, 1), checkpoint)


def label_array(labels, target: Target) -> np.ndarray:
    """Class indices (N,), or indicators (N, K) bool of a multi-label target given as such or as tuples of indices."""
    if target.kind != MULTILABEL:
        return np.asarray(labels, dtype=int)
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        return labels.astype(bool)
    array = np.zeros((len(labels), len(target.classes)), dtype=bool)
    for row, indices in enumerate(labels):
        array[row, list(indices)] = True
    return array


def predicted_labels(probabilities: np.ndarray, target: Target) -> np.ndarray:
    """The most probable class (N,), or for a multi-label target (N, K) bool: every class from 0.5 on."""
    return probabilities >= THRESHOLD if target.kind == MULTILABEL else probabilities.argmax(axis=1)


def cell(label, target: Target) -> str:
    """The text of an entry of :func:`label_array`, as ``Target.parse`` reads it."""
    return target.cell(tuple(np.flatnonzero(label)) if target.kind == MULTILABEL else int(label))


def probability_columns(target: Target) -> list[str]:
    """Names of the columns that hold the probabilities."""
    return [f"p_{name}" for name in target.classes]


def shown_probability(value: float) -> str:
    """Nine digits give back every number of single precision, so a table keeps all ranks."""
    return f"{value:.9g}"


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write the table ``case,subject,target,label,predicted,checkpoint,p_CLASS…``, atomically."""
    target = predictions.target
    decisions = predicted_labels(predictions.probabilities, target)
    rows = zip(
        predictions.cases, predictions.subjects, predictions.labels, decisions, predictions.probabilities, strict=True
    )
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "subject", "target", "label", "predicted", "checkpoint", *probability_columns(target)])
        for case, subject, label, decision, probabilities in rows:
            table.writerow(
                [
                    case,
                    subject,
                    target.name,
                    cell(label, target),
                    cell(decision, target),
                    predictions.checkpoint,
                    *map(shown_probability, probabilities),
                ]
            )


def read_predictions(
    path: str | Path,
    target: Target,
    *,
    references: Mapping[str, tuple[str, Label]] | None = None,
) -> Predictions:
    """Read a table of predictions.

    Args:
        path: with the columns ``case`` and ``p_CLASS…``, and ``label`` where ``references`` is None.
        target: what it predicts.
        references: case → (subject, label) instead of the table's own columns; every case must be in it.

    Raises:
        UserError: the file is missing or malformed, or a case has no label or occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no {path}.", "Finish the training, or name another file or folder.")
    rows = read_table(path)
    missing = [
        name
        for name in (*probability_columns(target), *(["label"] if references is None else []))
        if name not in rows[0]
    ]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}, which {target.name} needs.",
            "Name the table of labels with -ref FILE.csv."
            if missing == ["label"]
            else "Name a table that predicts this target, or predict the cases again.",
        )
    cases = [row["case"] for row in rows]
    if len(set(cases)) < len(cases):
        twice = next(case for number, case in enumerate(cases) if case in cases[:number])
        raise UserError(f"{path}: case {twice} occurs more than once.", "Keep one row per case.")
    found = _own_labels(rows, target, path) if references is None else _given_labels(cases, references, path)
    try:
        probabilities = [[float(row[name]) for name in probability_columns(target)] for row in rows]
    except ValueError as error:
        raise UserError(f"{path}: a probability is no number: {error}.", "Predict the cases again.") from error
    subjects, labels = zip(*found, strict=True)
    checkpoints = sorted({row.get("checkpoint", "") for row in rows})
    return make_predictions(
        target, cases, subjects, list(labels), probabilities, checkpoint=" and ".join(filter(None, checkpoints))
    )


def _own_labels(rows: Sequence[Mapping[str, str]], target: Target, path: Path) -> list[tuple[str, Label]]:
    missing = [row["case"] for row in rows if target.is_missing(row["label"])]
    if missing:
        raise UserError(
            f"{path}: no label for {some(missing)}.", "Fill it in, or name the table of labels with -ref FILE.csv."
        )
    try:
        return [(subject_of(row), target.parse(row["label"])) for row in rows]
    except ValueError as error:
        raise UserError(
            f"{path}: {str(error)!r} is no class of {target.name} ({', '.join(target.classes)}).",
            "Name the table of another run, or correct the cell.",
        ) from error


def _given_labels(
    cases: Sequence[str],
    references: Mapping[str, tuple[str, Label]],
    path: Path,
) -> list[tuple[str, Label]]:
    unknown = [case for case in cases if case not in references]
    if unknown:
        raise UserError(
            f"{len(unknown)} cases of {path} have no label: {some(unknown)}.",
            "Add them to the table of labels, or leave them out of the predictions.",
        )
    return [references[case] for case in cases]
