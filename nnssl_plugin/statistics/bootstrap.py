"""Two sets of scores of the same cases, compared with an interval from the bootstrap over cases."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 2**22
"""Indices that are drawn at once (32 MiB), so that thousands of cases fit into memory."""


@dataclass(frozen=True)
class Interval:
    """Mean paired difference and its confidence interval, in the unit of the scores."""

    mean: float  # NaN without a pair
    low: float  # NaN with fewer than two pairs: one case says nothing about the spread
    high: float
    pairs: int  # cases with a score on both sides


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a − b with its percentile bootstrap interval over cases.

    Cases are drawn with replacement, both scores of a case together; the interval spans the central ``confidence`` of
    the means (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Args:
        a: scores (N,).
        b: scores (N,) of the same cases in the same order. Pairs with a NaN on either side are left out.
        samples: how many times the cases are drawn.
        confidence: in (0, 1).
        seed: the same seed gives the same interval.

    Raises:
        ValueError: the shapes differ or are not (N,), or ``confidence`` or ``samples`` is out of range.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"Paired scores have one shape (N,); these have {a.shape} and {b.shape}.")
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1), or samples={samples} is below 1.")
    differences = a - b
    differences = differences[~np.isnan(differences)]
    if len(differences) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(differences.mean())
    if len(differences) == 1:
        return Interval(mean, np.nan, np.nan, 1)
    means = _resampled_means(differences, samples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), len(differences))


def _resampled_means(values: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    rows = max(1, CHUNK // len(values))
    chunks = [min(rows, samples - start) for start in range(0, samples, rows)]
    return np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in chunks])
