"""How well slices and texts find each other: recall and median rank, beside what guessing gives.

Equal texts count as one candidate, and any slice that has the text is right for it, so that repeated captions
are neither held against a pair of encoders nor in its favour.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import hypergeom

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


def first_right_ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank of the best right candidate of each query, counted from 1.

    A wrong candidate of the same score (or with NaN) stands before the right one: encoders that have collapsed to a
    constant come out last, not first.

    Args:
        scores: (queries, candidates), higher is better.
        right: the same shape, bool; at least one per query.
    """
    best = np.max(np.where(right, scores, -np.inf), axis=1, keepdims=True)
    return 1 + np.sum(~right & ~(scores < best), axis=1)


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
