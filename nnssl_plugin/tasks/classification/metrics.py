"""The metrics of a classifier: their names and titles, and their values for many weightings of the cases at once.

A bootstrap draw is a weighting by whole numbers, so ten thousand draws are a few matrix products; with weights of one
the metrics are those of scikit-learn. Shapes: N cases, K classes, S weightings.
"""

import numpy as np

from nnssl_plugin.nnunet.case_labels import BINARY, MULTILABEL, ORDINAL, Target
from nnssl_plugin.statistics.areas import areas, ratio
from nnssl_plugin.statistics.metric import Metric
from nnssl_plugin.tasks.classification.predictions import predicted_labels

METRICS = (
    Metric("auroc", "AUROC", per_class=True),
    Metric("average_precision", "average precision", per_class=True),
    Metric("sensitivity", "sensitivity", per_class=True, overall=False),
    Metric("specificity", "specificity", per_class=True, overall=False),
    Metric("ppv", "positive predictive value", per_class=True, overall=False),
    Metric("npv", "negative predictive value", per_class=True, overall=False),
    Metric("f1", "F1", per_class=True, overall=False),
    Metric("accuracy", "accuracy"),
    Metric("balanced_accuracy", "balanced accuracy"),
    Metric("macro_f1", "macro F1"),
    Metric("quadratic_kappa", "quadratic kappa"),
    Metric("mean_absolute_error", "mean absolute error", lower_is_better=True),
    Metric("brier", "Brier score", lower_is_better=True),
    Metric("ece", "calibration error", lower_is_better=True),
)
"""All of them, in the order of tables and figures; a class's own are named ``METRIC/CLASS``."""
OVERALL = tuple(metric.name for metric in METRICS if metric.overall)
OF_CLASS = tuple(metric.name for metric in METRICS if metric.per_class)
OF_ORDINAL = ("quadratic_kappa", "mean_absolute_error")
"""Those that ordinal targets alone have."""
PRINTED = ("auroc", "accuracy", "balanced_accuracy", "macro_f1", "ece")
"""Those that a run's short table shows."""
BINS = 10
"""Bins of equal width of the expected calibration error and of the reliability figure."""


def class_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    weights: np.ndarray,
    *,
    target: Target,
) -> dict[str, np.ndarray]:
    """Every metric of a target, name → (S,); NaN where it is not defined.

    ``METRIC/CLASS`` is a class against the rest. ``auroc`` and ``average_precision`` are those of the second class of
    a binary target, and else the mean over the classes for which they are defined. Which classes a mean runs over is
    fixed by all N cases: a weighting that lacks one of them has no mean.

    Args:
        labels: (N,) class indices, or (N, K) bool of a multi-label target.
        probabilities: (N, K).
        weights: (S, N), not negative.
        target: kind and classes.
    """
    decisions = predicted_labels(probabilities, target)
    truth, predicted = indicators(labels, target), indicators(decisions, target)
    metrics = _counted(truth, predicted, weights, target)
    for k, name in enumerate(target.classes):
        auroc, precision = areas(probabilities[:, k], truth[:, k], weights)
        metrics[f"auroc/{name}"], metrics[f"average_precision/{name}"] = auroc, precision
    for metric in ("auroc", "average_precision"):
        of_class = np.stack([metrics[f"{metric}/{name}"] for name in target.classes])
        both = truth.any(axis=0) & ~truth.all(axis=0)
        metrics[metric] = of_class[1] if target.kind == BINARY else _mean(of_class, both)
    metrics |= _calibration(labels, decisions, probabilities, truth, weights, target)
    if target.kind == ORDINAL:
        metrics |= _ordinal(labels, decisions, truth, predicted, weights)
    return metrics


def metric_of(name: str) -> Metric:
    """The metric of a name, also of ``METRIC/CLASS``."""
    return next(metric for metric in METRICS if metric.name == name.partition("/")[0])


def metric_title(name: str) -> str:
    """What tables and figures call a metric, also of ``METRIC/CLASS``."""
    of_class = name.partition("/")[2]
    title = metric_of(name).title
    return f"{title} of {of_class}" if of_class else title


def overall_metrics(target: Target) -> list[str]:
    """Names of the metrics that a target has for all classes together."""
    return [name for name in OVERALL if target.kind == ORDINAL or name not in OF_ORDINAL]


def indicators(labels: np.ndarray, target: Target) -> np.ndarray:
    """(N, K) bool: which classes a case has."""
    return labels if labels.ndim == 2 else labels[:, None] == np.arange(len(target.classes))


def calibration_pairs(
    labels: np.ndarray,
    decisions: np.ndarray,
    probabilities: np.ndarray,
    target: Target,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What calibration compares: (probability (N,), whether it came true (N,)).

    A binary target gives its second class; a multi-label one every class; all others the most probable class and
    whether it is right (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2).
    """
    if target.kind == MULTILABEL:
        return [(probabilities[:, k], labels[:, k]) for k in range(len(target.classes))]
    if target.kind == BINARY:
        return [(probabilities[:, 1], labels == 1)]
    return [(probabilities.max(axis=1), labels == decisions)]


def bin_of(probabilities: np.ndarray) -> np.ndarray:
    """The bin of each probability, 0 to BINS − 1; 1.0 belongs to the last one."""
    return np.clip((probabilities * BINS).astype(int), 0, BINS - 1)


def _counted(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, target: Target) -> dict[str, np.ndarray]:
    """What follows from counts of right and wrong decisions."""
    total = weights.sum(axis=1, keepdims=True)
    hits, real, claimed = (weights @ mask.astype(float) for mask in (truth & predicted, truth, predicted))
    rejected = total - real - claimed + hits
    by_class = {
        "sensitivity": ratio(hits, real),
        "specificity": ratio(rejected, total - real),
        "ppv": ratio(hits, claimed),
        "npv": ratio(rejected, total - claimed),
        "f1": ratio(2 * hits, real + claimed),
    }
    metrics = {
        f"{metric}/{name}": values[:, k] for metric, values in by_class.items() for k, name in enumerate(target.classes)
    }
    if target.kind == MULTILABEL:
        recall, present = (
            np.hstack([by_class["sensitivity"], by_class["specificity"]]),
            np.hstack([truth.any(axis=0), ~truth.all(axis=0)]),
        )
    else:
        recall, present = by_class["sensitivity"], truth.any(axis=0)
    return metrics | {
        "accuracy": ratio(weights @ (truth == predicted).all(axis=1).astype(float), total[:, 0]),
        "balanced_accuracy": _mean(recall.T, present),
        "macro_f1": _mean(by_class["f1"].T, (truth | predicted).any(axis=0)),
    }


def _calibration(labels, decisions, probabilities, truth, weights, target: Target) -> dict[str, np.ndarray]:
    total = weights.sum(axis=1)
    squares = (probabilities - truth) ** 2
    of_case = squares.mean(axis=1) if target.kind in (BINARY, MULTILABEL) else squares.sum(axis=1)
    gaps = []
    for claimed, came_true in calibration_pairs(labels, decisions, probabilities, target):
        in_bin = bin_of(claimed)[:, None] == np.arange(BINS)
        gaps.append(np.abs(weights @ (in_bin * (claimed - came_true)[:, None])).sum(axis=1) / total)
    return {"brier": weights @ of_case / total, "ece": np.mean(gaps, axis=0)}


def _ordinal(labels, decisions, truth, predicted, weights) -> dict[str, np.ndarray]:
    """Mean absolute error in classes, and Cohen's kappa with quadratic weights."""
    total = weights.sum(axis=1)
    steps = np.arange(truth.shape[1])
    real, claimed = weights @ truth.astype(float), weights @ predicted.astype(float)
    expected = np.einsum("si,sj,ij->s", real, claimed, (steps[:, None] - steps) ** 2.0)
    observed = weights @ ((labels - decisions) ** 2.0)
    return {
        "mean_absolute_error": weights @ np.abs(labels - decisions).astype(float) / total,
        "quadratic_kappa": 1 - ratio(observed * total, expected),
    }


def _mean(values: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Mean over the chosen rows of (R, S); NaN where one of them is, or none is chosen."""
    return values[over].mean(axis=0) if over.any() else np.full(values.shape[1], np.nan)
