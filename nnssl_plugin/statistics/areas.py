"""Areas under ROC and precision-recall curves, for many weightings of the cases at once."""

import numpy as np


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
    precision = ratio(found, found + alarms)
    average = (more * np.nan_to_num(precision)).sum(axis=1)
    return ratio(roc, found[:, -1] * alarms[:, -1]), ratio(average, found[:, -1])


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)
