"""Scores of the same cases compared, with intervals and tests that draw subjects: their cases stay together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CHUNK = 2**22
"""Numbers that are held at once (32 MiB), so that thousands of subjects fit into memory."""


@dataclass(frozen=True)
class Interval:
    """Mean paired difference and its confidence interval, in the unit of the scores."""

    mean: float  # NaN without a pair
    low: float  # NaN with fewer than two subjects: one says nothing about the spread
    high: float
    pairs: int  # cases with a score on both sides


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    subjects: Sequence[str] | None = None,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a − b over the cases, with its percentile bootstrap interval over subjects (SciPy's).

    Subjects are drawn with replacement, each with all of its cases and both scores of a case together; the interval
    spans the central ``confidence`` of the means (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section
    13.3; drawing clusters: Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

    Args:
        a: scores (N,).
        b: scores (N,) of the same cases in the same order. Pairs with a NaN on either side are left out.
        subjects: N names; None: each case is its own subject.
        samples: how many times the subjects are drawn.
        confidence: in (0, 1).
        seed: the same seed gives the same interval.

    Raises:
        ValueError: the shapes differ or are not (N,), or ``confidence`` or ``samples`` is out of range.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    names = np.arange(len(a)) if subjects is None else np.asarray(subjects)
    if a.shape != b.shape or a.ndim != 1 or names.shape != a.shape:
        raise ValueError(f"Paired scores have one shape (N,); these have {a.shape}, {b.shape} and {names.shape}.")
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1), or samples={samples} is below 1.")
    differences = a - b
    defined = ~np.isnan(differences)
    differences, names = differences[defined], names[defined]
    if len(differences) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(differences.mean())
    sums, counts = subject_sums(differences, names)
    if len(sums) == 1:
        return Interval(mean, np.nan, np.nan, len(differences))
    drawn = stats.bootstrap(
        (sums, counts),
        lambda total, number, axis: total.sum(axis) / number.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=samples,
        batch=max(1, CHUNK // len(sums)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high), len(differences))


def hierarchical_bootstrap(
    differences: np.ndarray,
    *,
    subjects: Sequence[str] | None = None,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean paired difference of runs that were repeated, with an interval over the subjects *and* the repeats.

    Each axis is drawn with replacement on its own, subjects with all of their cases: every repeat scored the same
    cases, so the axes cross (Owen, The Pigeonhole Bootstrap, Annals of Applied Statistics 1, 2007). An interval over
    cases alone says what other cases would give with these very weights; this one also says what another seed would.
    With n repeats their part of the spread comes out too small by √((n − 1)/n): few seeds flatter.

    Args:
        differences: (..., N) of the N cases under each repeat, for example (seeds, cases) or (pretrainings, label
            draws, cases). NaN is left out.
        subjects: N names; None: each case is its own subject.
        samples: how many times everything is drawn.
        confidence: in (0, 1).
        seed: the same seed gives the same interval.

    Returns:
        the mean over all that is defined, its percentile interval (NaN where an axis holds fewer than two: one says
        nothing about the spread) and the number of differences that are defined.

    Raises:
        ValueError: there is no axis of repeats, the subjects are not N, or ``confidence`` or ``samples`` is out of
            range.
    """
    differences = np.asarray(differences, dtype=float)
    names = np.arange(differences.shape[-1]) if subjects is None else np.asarray(subjects)
    if differences.ndim < 2 or names.shape != differences.shape[-1:]:
        raise ValueError(f"Differences are (..., N) with N subjects, not {differences.shape} with {names.shape}.")
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1), or samples={samples} is below 1.")
    defined = ~np.isnan(differences)
    pairs = int(defined.sum())
    if pairs == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    _, subject_of = np.unique(names, return_inverse=True)
    members = np.eye(subject_of.max() + 1)[subject_of]
    sums, counts = np.where(defined, differences, 0.0) @ members, defined @ members  # (..., S)
    mean = float(sums.sum() / counts.sum())
    if min(sums.shape) < 2:
        return Interval(mean, np.nan, np.nan, pairs)
    rng, axes = np.random.default_rng(seed), "abcdefgh"[: sums.ndim]
    weighed = ",".join([axes, *(f"z{axis}" for axis in axes)]) + "->z"
    drawn = []
    for start in range(0, samples, rows := max(1, CHUNK // sums.size)):
        number = min(rows, samples - start)
        weights = [rng.multinomial(n, np.full(n, 1 / n), size=number).astype(float) for n in sums.shape]
        total, held = (np.einsum(weighed, values, *weights, optimize=True) for values in (sums, counts))
        drawn.append(np.divide(total, held, out=np.full(number, np.nan), where=held > 0))
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), pairs)


def paired_permutation_p(
    differences: np.ndarray, subjects: Sequence[str] | np.ndarray, *, samples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of a paired permutation test of a mean difference (SciPy's).

    If neither run were better, each subject's differences could as well have the other sign; all cases of a subject
    change it together. With few subjects every assignment of signs is tried; else the observed one counts as one of the
    random ones, so p is never 0 (Phipson and Smyth, Permutation P-values Should Never Be Zero, 2010).

    Args:
        differences: (N,) of each case.
        subjects: N names.
        samples: random assignments.
        seed: the same seed gives the same p.
    """
    sums, _ = subject_sums(np.asarray(differences, dtype=float), np.asarray(subjects))
    sums = sums[sums != 0]
    if len(sums) < 2:  # either sign is as far from 0
        return 1.0
    return float(
        stats.permutation_test(
            (sums,),
            lambda values, axis: np.abs(values.sum(axis)),
            permutation_type="samples",
            alternative="greater",
            vectorized=True,
            n_resamples=samples,
            batch=max(1, CHUNK // len(sums)),
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def subject_sums(values: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum (S,) of the values (N,) of each subject and its number of cases, in the order of the sorted subjects."""
    _, subject_of = np.unique(subjects, return_inverse=True)
    return np.bincount(subject_of, weights=values), np.bincount(subject_of)


def subject_weights(subjects: Sequence[str], *, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each case counts in each bootstrap draw of subjects, in chunks (S, N).

    For metrics that are quick for many weightings of the cases at once and not defined in some draws, which SciPy's
    bootstrap does not leave out.

    Args:
        subjects: N names.
        samples: how many draws in all.
        seed: the same seed gives the same draws.
    """
    names, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // 4 // len(subject_of))
    for start in range(0, samples, rows):
        number = min(rows, samples - start)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=number)
        yield drawn[:, subject_of].astype(float)


def percentile_interval(values: np.ndarray, *, confidence: float = 0.95) -> list[float | None]:
    """[low, high] of the values of draws that are defined; [None, None] where more than every tenth is NaN."""
    defined = values[~np.isnan(values)]
    if len(defined) < 0.9 * len(values):
        return [None, None]
    return [float(edge) for edge in np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])]
