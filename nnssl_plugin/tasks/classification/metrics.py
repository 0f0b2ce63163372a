"""Measures of a classifier, for many weightings of the cases at once.

A bootstrap draw is a weighting by whole numbers, so ten thousand draws are a few matrix products; with weights of one
the measures are those of scikit-learn. Shapes: N cases, K classes, S weightings.
"""

import numpy as np

from nnssl_plugin.nnunet.case_labels import BINARY, MULTILABEL, ORDINAL, Target
from nnssl_plugin.tasks.classification.predictions import predicted_labels

BINS = 10
"""Bins of equal width of the expected calibration error and of the reliability figure."""


def class_measures(
    labels: np.ndarray,
    probabilities: np.ndarray,
    weights: np.ndarray,
    *,
    target: Target,
) -> dict[str, np.ndarray]:
    """Every measure of a target, name → (S,); NaN where it is not defined.

    ``MEASURE/CLASS`` is a class against the rest. ``auroc`` and ``average_precision`` are those of the second class of
    a binary target, and else the mean over the classes for which they are defined. Which classes a mean runs over is
    fixed by all N cases: a weighting that lacks one of them has no mean.

    Args:
        labels: (N,) class indices, or (N, K) bool of a multi-label target.
        probabilities: (N, K).
        weights: (S, N), not negative.
        target: kind and classes.
    """
    answers = predicted_labels(probabilities, target)
    truth, predicted = indicators(labels, target), indicators(answers, target)
    measures = _counted(truth, predicted, weights, target)
    for k, name in enumerate(target.classes):
        auroc, precision = areas(probabilities[:, k], truth[:, k], weights)
        measures[f"auroc/{name}"], measures[f"average_precision/{name}"] = auroc, precision
    for measure in ("auroc", "average_precision"):
        of_class = np.stack([measures[f"{measure}/{name}"] for name in target.classes])
        both = truth.any(axis=0) & ~truth.all(axis=0)
        measures[measure] = of_class[1] if target.kind == BINARY else _mean(of_class, both)
    measures |= _calibration(labels, answers, probabilities, truth, weights, target)
    if target.kind == ORDINAL:
        measures |= _ordinal(labels, answers, truth, predicted, weights)
    return measures


def indicators(labels: np.ndarray, target: Target) -> np.ndarray:
    """(N, K) bool: which classes a case has."""
    return labels if labels.ndim == 2 else labels[:, None] == np.arange(len(target.classes))


def areas(scores: np.ndarray, positives: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the ROC and (as average precision) the precision-recall curve, each (S,).

    Cases of equal score enter both curves together, as in scikit-learn.

    Args:
        scores: (N,).
        positives: (N,) bool.
        weights: (S, N).
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found = np.cumsum(weights[:, order] * positives[order], axis=1)[:, ends]
    alarms = np.cumsum(weights[:, order] * ~positives[order], axis=1)[:, ends]
    more = np.diff(found, axis=1, prepend=0.0)
    roc = (np.diff(alarms, axis=1, prepend=0.0) * (found - more / 2)).sum(axis=1)
    precision = _ratio(found, found + alarms)
    average = (more * np.nan_to_num(precision)).sum(axis=1)
    return _ratio(roc, found[:, -1] * alarms[:, -1]), _ratio(average, found[:, -1])


def calibration_pairs(
    labels: np.ndarray,
    answers: np.ndarray,
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
    return [(probabilities.max(axis=1), labels == answers)]


def bin_of(probabilities: np.ndarray) -> np.ndarray:
    """The bin of each probability, 0 to BINS − 1; 1.0 belongs to the last one."""
    return np.clip((probabilities * BINS).astype(int), 0, BINS - 1)


def _counted(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, target: Target) -> dict[str, np.ndarray]:
    """What follows from counts of right and wrong answers."""
    total = weights.sum(axis=1, keepdims=True)
    hits, real, claimed = (weights @ mask.astype(float) for mask in (truth & predicted, truth, predicted))
    rejected = total - real - claimed + hits
    by_class = {
        "sensitivity": _ratio(hits, real),
        "specificity": _ratio(rejected, total - real),
        "ppv": _ratio(hits, claimed),
        "npv": _ratio(rejected, total - claimed),
        "f1": _ratio(2 * hits, real + claimed),
    }
    measures = {
        f"{measure}/{name}": values[:, k]
        for measure, values in by_class.items()
        for k, name in enumerate(target.classes)
    }
    if target.kind == MULTILABEL:
        recall, present = (
            np.hstack([by_class["sensitivity"], by_class["specificity"]]),
            np.hstack([truth.any(axis=0), ~truth.all(axis=0)]),
        )
    else:
        recall, present = by_class["sensitivity"], truth.any(axis=0)
    return measures | {
        "accuracy": _ratio(weights @ (truth == predicted).all(axis=1).astype(float), total[:, 0]),
        "balanced_accuracy": _mean(recall.T, present),
        "macro_f1": _mean(by_class["f1"].T, (truth | predicted).any(axis=0)),
    }


def _calibration(labels, answers, probabilities, truth, weights, target: Target) -> dict[str, np.ndarray]:
    total = weights.sum(axis=1)
    squares = (probabilities - truth) ** 2
    of_case = squares.mean(axis=1) if target.kind in (BINARY, MULTILABEL) else squares.sum(axis=1)
    gaps = []
    for claimed, came_true in calibration_pairs(labels, answers, probabilities, target):
        in_bin = bin_of(claimed)[:, None] == np.arange(BINS)
        gaps.append(np.abs(weights @ (in_bin * (claimed - came_true)[:, None])).sum(axis=1) / total)
    return {"brier": weights @ of_case / total, "ece": np.mean(gaps, axis=0)}


def _ordinal(labels, answers, truth, predicted, weights) -> dict[str, np.ndarray]:
    """Mean absolute error in classes, and Cohen's kappa with quadratic weights."""
    total = weights.sum(axis=1)
    steps = np.arange(truth.shape[1])
    real, claimed = weights @ truth.astype(float), weights @ predicted.astype(float)
    expected = np.einsum("si,sj,ij->s", real, claimed, (steps[:, None] - steps) ** 2.0)
    observed = weights @ ((labels - answers) ** 2.0)
    return {
        "mean_absolute_error": weights @ np.abs(labels - answers).astype(float) / total,
        "quadratic_kappa": 1 - _ratio(observed * total, expected),
    }


def _mean(values: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Mean over the chosen rows of (R, S); NaN where one of them is, or none is chosen."""
    return values[over].mean(axis=0) if over.any() else np.full(values.shape[1], np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)
