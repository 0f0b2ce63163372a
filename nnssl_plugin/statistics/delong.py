"""Whether two areas under the ROC curve of the same cases differ: DeLong's test, also with several cases per subject.

E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson, Comparing the Areas under Two or More Correlated Receiver Operating
Characteristic Curves, Biometrics 44 (1988). Computed from midranks in O(N log N): X. Sun and W. Xu, Fast Implementation
of DeLong's Algorithm, IEEE Signal Processing Letters 21 (2014). Cases of one subject are summed before variances are
taken: N. A. Obuchowski, Nonparametric Analysis of Clustered ROC Curve Data, Biometrics 53 (1997); with one case per
subject that is DeLong's covariance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata


@dataclass(frozen=True)
class AurocDifference:
    """First area minus second. All NaN where a class is missing; no interval where fewer than two subjects have it."""

    difference: float
    low: float
    high: float
    p: float  # two-sided; 1 where the difference and its standard error are both 0


def auroc_difference(
    first: np.ndarray, second: np.ndarray, positives: np.ndarray, *, subjects: Sequence[str], confidence: float = 0.95
) -> AurocDifference:
    """Compare the areas of two scores of the same cases.

    Args:
        first: scores (N,), larger for positives.
        second: scores (N,) of the same cases.
        positives: (N,) bool.
        subjects: N names.
        confidence: in (0, 1), of the interval.
    """
    areas, covariance = delong_covariance(np.stack([first, second]), positives, subjects=subjects)
    difference = float(areas[0] - areas[1])
    # identical scores leave a rounding error, which must not become a standard error
    variance = max(0.0, float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    error = np.sqrt(variance) if not variance < 1e-16 else 0.0
    if np.isnan(covariance).any():
        return AurocDifference(difference, np.nan, np.nan, np.nan)
    if error == 0:
        return AurocDifference(difference, difference, difference, 1.0 if abs(difference) < 1e-12 else np.nan)
    reach = float(norm.ppf((1 + confidence) / 2) * error)
    return AurocDifference(
        difference, difference - reach, difference + reach, float(2 * norm.sf(abs(difference) / error))
    )


def delong_covariance(
    scores: np.ndarray,
    positives: np.ndarray,
    *,
    subjects: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Areas (R,) of R scores of the same cases, and their covariance (R, R).

    Args:
        scores: (R, N).
        positives: (N,) bool.
        subjects: N names.

    Returns:
        areas, NaN where a class is missing, and covariance, NaN where fewer than two subjects have a class.
    """
    number = len(scores)
    m, n = int(positives.sum()), int((~positives).sum())
    if not m or not n:
        return np.full(number, np.nan), np.full((number, number), np.nan)
    ranks = rankdata(scores, axis=1)
    of_positives = (ranks[:, positives] - rankdata(scores[:, positives], axis=1)) / n
    of_negatives = 1 - (ranks[:, ~positives] - rankdata(scores[:, ~positives], axis=1)) / m
    areas = of_positives.mean(axis=1)
    names, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    sums, with_class = [], []
    for values, mask in ((of_positives, positives), (of_negatives, ~positives)):
        total = np.zeros((number, len(names)))
        np.add.at(total.T, subject_of[mask], (values - areas[:, None]).T)
        sums.append(total)
        with_class.append(len(np.unique(subject_of[mask])))
    if min(with_class) < 2:
        return areas, np.full((number, number), np.nan)
    (up, down), (i, j) = sums, with_class
    both = up @ down.T * len(names) / (len(names) - 1) / (m * n)
    return areas, up @ up.T * i / (i - 1) / m**2 + down @ down.T * j / (j - 1) / n**2 + both + both.T
