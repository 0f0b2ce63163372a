"""How good a classifier is: every metric of a set of predictions, with intervals over subjects, and its files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.case_labels import BINARY, MULTILABEL, Target
from nnssl_plugin.statistics.bootstrap import percentile_interval, subject_weights
from nnssl_plugin.tasks.classification.checkpoints import BEST, TOO_GOOD
from nnssl_plugin.tasks.classification.metrics import BINS, OF_CLASS, class_metrics, indicators
from nnssl_plugin.tasks.classification.predictions import (
    Predictions,
    make_predictions,
    name_suffix,
    predicted_labels,
    write_predictions,
)

CONFIDENCE, SAMPLES, SEED = 0.95, 2000, 0


def write_validation(
    folder: str | Path,
    target: Target,
    cases: Sequence[str],
    subjects: Sequence[str],
    labels,
    probabilities,
    *,
    targets: Sequence[Target] = (),
    checkpoint: str = "",
) -> dict[str, Any]:
    """Write ``predictions.csv``, ``summary.json`` and the figures of one target, and return the summary.

    Args:
        folder: for example ``fold_0/validation``.
        target: what was predicted.
        cases: N names.
        subjects: of the cases; intervals come from drawing subjects.
        labels: as :func:`make_predictions` takes them.
        probabilities: (N, K) in [0, 1].
        targets: all targets of the run; with several, names of files end in ``_TARGET``.
        checkpoint: whose predictions they are, see :class:`Predictions`.

    Raises:
        UserError: a probability is NaN or out of range, or numbers do not belong together.
    """
    predictions = make_predictions(target, cases, subjects, labels, probabilities, checkpoint=checkpoint)
    return write_predictions_and_summary(folder, predictions, targets=targets)


def write_predictions_and_summary(
    folder: str | Path, predictions: Predictions, *, targets: Sequence[Target] = (), more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The files of :func:`write_validation`, with further entries of ``summary.json`` in ``more``."""
    from nnssl_plugin.tasks.classification.figures import draw_class_figures

    folder, target = Path(folder), predictions.target
    suffix = name_suffix(target, targets)
    summary = summarise_predictions(predictions) | {"intervals": subject_intervals(predictions)} | (more or {})
    write_predictions(folder / f"predictions{suffix}.csv", predictions)
    write_json(folder / f"summary{suffix}.json", summary)
    draw_class_figures(folder, predictions, summary["intervals"], suffix=suffix)
    return summary


def class_summary(labels, probabilities, *, target: Target, subjects: Sequence[str]) -> dict[str, Any]:
    """Every metric, ready for JSON: quick enough for every epoch, without intervals.

    A metric that is not defined is null, and ``undefined`` says why. Definitions: docs/how-to/classify.md.

    Args:
        labels: N class indices, or (N, K) indicators or tuples of indices of a multi-label target.
        probabilities: (N, K) in [0, 1].
        target: kind and classes.
        subjects: of the cases.
    """
    cases = [str(i) for i in range(len(subjects))]
    return summarise_predictions(make_predictions(target, cases, subjects, labels, probabilities))


def summarise_predictions(predictions: Predictions) -> dict[str, Any]:
    """:func:`class_summary` of a table."""
    target, labels = predictions.target, predictions.labels
    decisions = predicted_labels(predictions.probabilities, target)
    truth, predicted = indicators(labels, target), indicators(decisions, target)
    found = class_metrics(labels, predictions.probabilities, np.ones((1, len(labels))), target=target)
    values = {name: None if np.isnan(value[0]) else float(value[0]) for name, value in found.items()}
    per_class = {
        name: {"cases": int(truth[:, k].sum()), "predicted": int(predicted[:, k].sum())}
        | {metric: values[f"{metric}/{name}"] for metric in OF_CLASS}
        for k, name in enumerate(target.classes)
    }
    return {
        "target": target.name,
        "kind": target.kind,
        "classes": list(target.classes),
        "cases": len(labels),
        "subjects": len(set(predictions.subjects)),
        "checkpoint": predictions.checkpoint or None,
        **({"warning": TOO_GOOD} if predictions.checkpoint == BEST else {}),
        **{name: value for name, value in values.items() if "/" not in name},
        "per_class": per_class,
        "confusion_matrix": confusion(truth, predicted, target),
        "calibration_bins": BINS,
        "undefined": dict(_reasons(values, truth, target)),
    }


def confusion(truth: np.ndarray, predicted: np.ndarray, target: Target) -> list:
    """Counts [true class][predicted class]; of a multi-label target one [[TN, FP], [FN, TP]] per class.

    Args:
        truth: (N, K) bool.
        predicted: (N, K) bool.
        target: kind and classes.
    """
    if target.kind != MULTILABEL:
        return (truth.T.astype(int) @ predicted.astype(int)).tolist()
    pairs = [
        (np.stack([~t, t]).astype(int), np.stack([~p, p]).astype(int))
        for t, p in zip(truth.T, predicted.T, strict=True)
    ]
    return [(real @ claimed.T).tolist() for real, claimed in pairs]


def subject_intervals(predictions: Predictions) -> dict[str, list[float | None]]:
    """Percentile bootstrap intervals of every metric, name → [low, high], from drawing subjects with replacement.

    All cases of a drawn subject count. Draws in which a metric is not defined are left out; where that is more than
    every tenth, or there is a single subject, the interval is [null, null].
    """
    if len(set(predictions.subjects)) < 2:
        names = class_metrics(
            predictions.labels,
            predictions.probabilities,
            np.ones((1, len(predictions.cases))),
            target=predictions.target,
        )
        return {name: [None, None] for name in names}
    drawn = resampled_metrics([predictions])[0]
    return {name: percentile_interval(values, confidence=CONFIDENCE) for name, values in drawn.items()}


def resampled_metrics(runs: Sequence[Predictions]) -> list[dict[str, np.ndarray]]:
    """Metrics of runs over the same cases, name → (SAMPLES,), the same subjects drawn for all."""
    parts = [
        [class_metrics(run.labels, run.probabilities, weights, target=run.target) for run in runs]
        for weights in subject_weights(runs[0].subjects, samples=SAMPLES, seed=SEED)
    ]
    return [{name: np.concatenate([part[i][name] for part in parts]) for name in parts[0][i]} for i in range(len(runs))]


def _reasons(values: dict[str, float | None], truth: np.ndarray, target: Target) -> Iterator[tuple[str, str]]:
    """Why a metric is null, or a mean leaves out a class."""
    named = list(zip(target.classes, truth.T, strict=True))
    absent = [name for name, has in named if not has.any()]
    universal = [name for name, has in named if has.all()]
    for metric, value in values.items():
        if value is None:
            yield metric, _why_null(metric, absent, universal)
    if absent and target.kind != BINARY:
        yield "means", f"means over classes leave out {', '.join(absent)}: no case has it"


def _why_null(metric: str, absent: list[str], universal: list[str]) -> str:
    name = metric.partition("/")[2]
    if name in absent:
        return f"no case has {name}"
    if name in universal:
        return f"every case has {name}"
    if name:
        return f"{name} is predicted for no case, or for every case"
    if metric == "quadratic_kappa":
        return "all cases have one class and it is predicted for all"
    return "all cases have one class"
