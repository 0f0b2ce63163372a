"""How well queries find what is right for them: ranks, recall, precision, gain, beside what guessing gives.

Of slices and texts equal texts count as one candidate, and any slice that has the text is right for it, so that
repeated captions are neither held against a pair of encoders nor in its favour.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from nnssl_plugin.statistics.bootstrap import paired_bootstrap, percentile_interval, subject_weights

DEPTHS = (1, 5, 10)
"""The k of recall@k."""
PAPER_DEPTH = 10
"""Among so many M3Ret's tables look for all right candidates; where there is none, the rank counts as one more."""
SLICE_TO_TEXT, TEXT_TO_SLICE = "slice_to_text", "text_to_slice"
TITLES = {SLICE_TO_TEXT: "slice → text", TEXT_TO_SLICE: "text → slice"}


@dataclass(frozen=True)
class Retrieval:
    """One direction of retrieval."""

    recall_at_1: float  # share of the queries whose first candidate is right
    recall_at_5: float  # share with a right one among the first five
    median_rank: float  # of the first right candidate; 1 is perfect
    queries: int
    candidates: int


def measure_retrieval(image: np.ndarray, text: np.ndarray, texts: list[str]) -> dict[str, Retrieval]:
    """Let every slice look for its text among the distinct texts, and every distinct text for its slices.

    Args:
        image: (N, E) embeddings of the slices, rows of length 1.
        text: (N, E) embeddings of their texts, rows of length 1.
        texts: the N texts; equal ones have equal embeddings.

    Returns:
        ``slice_to_text`` and ``text_to_slice``.
    """
    first, right = _distinct(texts)
    scores = image @ text[first].T
    return {
        SLICE_TO_TEXT: _summary(first_right_ranks(scores, right), candidates=right.shape[1]),
        TEXT_TO_SLICE: _summary(first_right_ranks(scores.T, right.T), candidates=right.shape[0]),
    }


def chance_of_retrieval(texts: list[str]) -> dict[str, Retrieval]:
    """What :func:`measure_retrieval` gives on average for candidates in random order.

    Among n candidates of which m are right, one of the first k is right with probability 1 − C(n−m, k) / C(n, k).
    """
    _, right = _distinct(texts)
    return {SLICE_TO_TEXT: _chance(right), TEXT_TO_SLICE: _chance(right.T)}


def first_right_ranks(scores: np.ndarray, right: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Rank of the best right candidate of each query, counted from 1.

    A wrong candidate of the same score (or with NaN) stands before the right one: encoders that have collapsed to a
    constant come out last, not first.

    Args:
        scores: (queries, candidates), higher is better.
        right: the same shape, bool; at least one per query.
        among: the same shape, bool, the candidates that a query may find; None: all.
    """
    wrong = ~right if among is None else ~right & among
    best = np.max(np.where(right & ~np.isnan(scores), scores, -np.inf), axis=1, keepdims=True)
    return 1 + np.sum(wrong & ~(scores < best), axis=1)


def query_metrics(
    scores: np.ndarray, right: np.ndarray, among: np.ndarray | None = None, *, depths: Sequence[int] = DEPTHS
) -> dict[str, np.ndarray]:
    """What is measured of each query, (queries,) float: NaN where no candidate is right for it.

    ``recall@k``: 1 where one of the first k is right; ``average_precision``: mean over the right candidates of the
    precision at their ranks; ``ndcg``: discounted gain Σ 1/log₂(1 + rank) of the right ones over that of the best order
    (Järvelin and Kekäläinen 2002, gains 0 and 1), over all candidates; ``rank``: of the first right one.
    ``mean_rank_top10_paper`` and ``median_rank_top10_paper`` are what the tables of M3Ret (Liu et al.) can only mean:
    mean and median of the ranks of *all* right candidates among the first ten, 11 where there is none. Perfect
    retrieval has 5.5 there, not 1. Equal scores are ordered with the wrong candidates first.

    Args:
        scores: (queries, candidates), higher is better.
        right: the same shape, bool.
        among: the same shape, bool, the candidates that a query may find; None: all.
        depths: the k of recall@k.
    """
    among = np.ones(scores.shape, dtype=bool) if among is None else among
    right = right & among
    found, total = _in_order(scores, right, among), right.sum(axis=1)
    places = np.arange(1, scores.shape[1] + 1)
    gains = 1 / np.log2(1 + places)
    best = np.concatenate(([0.0], np.cumsum(gains)))[total]
    first = first_right_ranks(scores, right, among)
    with np.errstate(invalid="ignore"):
        values = {
            **{f"recall@{k}": (first <= k).astype(float) for k in depths},
            "average_precision": np.sum(found * np.cumsum(found, axis=1) / places, axis=1) / total,
            "ndcg": np.sum(found * gains, axis=1) / best,
            "rank": first.astype(float),
            **_ranks_of_the_paper(found[:, :PAPER_DEPTH]),
        }
    return {name: np.where(total > 0, value, np.nan) for name, value in values.items()}


def expected_by_chance(candidates: np.ndarray, right: np.ndarray, *, depths: Sequence[int] = DEPTHS) -> dict:
    """Mean of ``recall@k`` and ``average_precision`` over the queries, for candidates in random order.

    Of n candidates of which m are right, one of the first k is right with probability 1 − C(n−m, k) / C(n, k); the
    expected average precision is (H + (n − H)(m − 1)/(n − 1)) / n with H = 1 + 1/2 + … + 1/n.

    Args:
        candidates: (queries,) n.
        right: (queries,) m; queries without a right candidate do not count.
        depths: the k of recall@k.
    """
    n, m = (np.asarray(each)[np.asarray(right) > 0] for each in (candidates, right))
    if not len(n):
        return {name: None for name in (*(f"recall@{k}" for k in depths), "average_precision")}
    harmonic = np.concatenate(([0.0], np.cumsum(1 / np.arange(1, n.max() + 1))))[n]
    precision = (harmonic + (n - harmonic) * (m - 1) / np.maximum(n - 1, 1)) / n
    recall = {f"recall@{k}": float(hypergeom(n, m, np.minimum(k, n)).sf(0).mean()) for k in depths}
    return recall | {"average_precision": float(precision.mean())}


def summarise_queries(
    values: dict[str, np.ndarray], subjects: Sequence[str], *, samples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Mean of each metric over the queries, ``rank`` also as median, with 95 % intervals over subjects.

    Args:
        values: of :func:`query_metrics`; queries with NaN are left out.
        subjects: one name per query; all queries of a subject are drawn together.
        samples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        metric → ``value`` and ``interval``; None where there is nothing to say.
    """
    names = np.asarray(subjects)
    summary = {}
    for name, of_queries in values.items():
        against = np.zeros(len(of_queries))
        found = paired_bootstrap(of_queries, against, subjects=list(subjects), samples=samples, seed=seed)
        title = {"rank": "mean_rank", "average_precision": "map"}.get(name, name)
        summary[title] = {"value": _plain(found.mean), "interval": [_plain(found.low), _plain(found.high)]}
        if name == "rank":
            summary["median_rank"] = _median(of_queries, names, samples=samples, seed=seed)
    return summary


def _in_order(scores: np.ndarray, right: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(queries, candidates) bool: whether the candidate at each rank is right; those of equal score wrong ones first,
    those that a query may not find last."""
    clean = np.where(np.isnan(scores), np.where(right, -np.inf, np.inf), scores)
    return np.take_along_axis(right, np.lexsort((right, -clean, ~among), axis=1), axis=1)


def _ranks_of_the_paper(found: np.ndarray) -> dict[str, np.ndarray]:
    ranks = np.where(found, np.arange(1, found.shape[1] + 1), np.nan)
    ranks[~found.any(axis=1), 0] = PAPER_DEPTH + 1
    return {
        "mean_rank_top10_paper": np.nanmean(ranks, axis=1),
        "median_rank_top10_paper": np.nanmedian(ranks, axis=1),
    }


def _median(ranks: np.ndarray, subjects: np.ndarray, *, samples: int, seed: int) -> dict:
    """Median over the queries, and its interval: in each draw that of the queries as often as they were drawn."""
    defined = ~np.isnan(ranks)
    ranks, subjects = ranks[defined], subjects[defined]
    if len(np.unique(subjects)) < 2:
        return {"value": _plain(np.median(ranks)) if len(ranks) else None, "interval": [None, None]}
    order = np.argsort(ranks)
    drawn = []
    for weights in subject_weights(list(subjects), samples=samples, seed=seed):
        reached = np.cumsum(weights[:, order], axis=1)
        half = reached[:, -1:] / 2
        middle = [np.argmax(reached >= half, axis=1), np.argmax(reached > half, axis=1)]  # they differ in a tie
        drawn.append(ranks[order][np.stack(middle)].mean(axis=0))
    return {"value": float(np.median(ranks)), "interval": percentile_interval(np.concatenate(drawn))}


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def retrieval_table(columns: dict[str, dict[str, Retrieval]]) -> list[str]:
    """Lines of a table with one column per entry, for example before, after and chance."""
    lines = [f"{'held-out retrieval':<24}" + "".join(f"{title:>10}" for title in columns)]
    for direction, title in TITLES.items():
        found = [column[direction] for column in columns.values()]
        of = f" of {found[0].candidates}"
        lines += [
            f"{title + ' R@1':<24}" + "".join(f"{one.recall_at_1:>10.1%}" for one in found),
            f"{title + ' R@5':<24}" + "".join(f"{one.recall_at_5:>10.1%}" for one in found),
            f"{title + ' rank' + of:<24}" + "".join(f"{one.median_rank:>10.1f}" for one in found),
        ]
    return lines


def as_plain(retrieval: dict[str, Retrieval]) -> dict[str, dict]:
    """For a JSON file."""
    return {direction: asdict(one) for direction, one in retrieval.items()}


def _distinct(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct text occurs first, and which (slice, distinct text) belong together."""
    _, first, index = np.unique(np.asarray(texts), return_index=True, return_inverse=True)
    return first, index[:, None] == np.arange(len(first))[None, :]


def _summary(ranks: np.ndarray, *, candidates: int) -> Retrieval:
    return Retrieval(
        recall_at_1=float(np.mean(ranks <= 1)),
        recall_at_5=float(np.mean(ranks <= 5)),
        median_rank=float(np.median(ranks)),
        queries=len(ranks),
        candidates=candidates,
    )


def _chance(right: np.ndarray) -> Retrieval:
    queries, candidates = right.shape
    counts = right.sum(axis=1, keepdims=True)
    depths = np.arange(1, candidates + 1)[None, :]
    found = hypergeom(candidates, counts, depths).sf(0).mean(axis=0)  # found[k − 1]: within the first k
    return Retrieval(
        recall_at_1=float(found[0]),
        recall_at_5=float(found[min(5, candidates) - 1]),
        median_rank=float(1 + np.searchsorted(found, (0.5 - 1e-9, 0.5 + 1e-9)).mean()),  # the middle of a tie
        queries=queries,
        candidates=candidates,
    )
