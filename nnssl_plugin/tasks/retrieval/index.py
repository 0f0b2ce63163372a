"""An index of embeddings, ready to be searched: exactly, block by block, or through its approximate neighbours."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from nnssl_plugin.data.vector_store import VectorStore
from nnssl_plugin.errors import UserError
from nnssl_plugin.tasks.retrieval.encoder import MAXIMUM
from nnssl_plugin.tasks.retrieval.standardisation import BLOCK, Standardisation

MOST_SCORES = 2**19
"""Scores that are held at once (2 MiB): they stay in the processor's cache while the best are looked for."""
FIRST_BLOCK, SMALLEST_BLOCK = 1024, 512
CONDITION = re.compile(r"\s*([^!=]+?)\s*(!?=)\s*(.*?)\s*")


@dataclass(frozen=True)
class Neighbours:
    """What queries found, the nearest first."""

    rows: np.ndarray
    """(Q, k) int: rows of the index, −1 where there are no more."""
    distances: np.ndarray
    """(Q, k) float32: 1 − cosine, in [0, 2]; infinite where there are no more."""


class Index:
    """An index as one moment shows it; see :func:`load_index`.

    Args:
        store: its files.

    Raises:
        UserError: it was never finished.
    """

    def __init__(self, store: VectorStore):
        self.store = store
        if not store.facts["frozen"]:
            raise UserError(
                f"{store.folder} is not finished: embed was interrupted.", "Run the same nnssl_plugin embed again."
            )
        self.is_standardised = MAXIMUM in store.facts["encoder"]["parts"]
        self.standardise = Standardisation(store.statistics() if self.is_standardised else None, store.dimensions)
        self.vectors = store.vectors()

    @cached_property
    def table(self) -> list[dict[str, str]]:
        """The cells of every row: ``case``, ``part``, ``subject``, ``image`` and what else was known."""
        return self.store.table()

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) lengths of the standardised vectors, 1 for those that are 0; measured once."""
        found = np.empty(len(self.vectors), dtype=np.float32)
        for start in range(0, len(self.vectors), BLOCK):
            moved = (self.vectors[start : start + BLOCK] - self.standardise.mean) * self.standardise.scale
            found[start : start + BLOCK] = np.linalg.norm(moved, axis=1)
        return np.where(found > 0, found, 1)

    def column(self, name: str) -> np.ndarray:
        """(N,) cells of a column, as text.

        Raises:
            UserError: there is no such column.
        """
        return column_of(self.store, self.table, name)

    def chosen(self, where: Sequence[str]) -> np.ndarray:
        """(N,) bool: see :func:`rows_where`."""
        return rows_where(self.store, self.table, where)

    def search(
        self,
        vectors: np.ndarray,
        k: int = 10,
        *,
        among: np.ndarray | None = None,
        subjects: Sequence[str | None] | None = None,
    ) -> Neighbours:
        """The k nearest rows of each query, by exact search.

        Args:
            vectors: (Q, E) raw vectors of the index's encoder.
            k: how many; fewer come where the index holds fewer.
            among: (N,) bool, the rows that may be found; None: all.
            subjects: one per query, whose rows it does not find; None, for all or one: it finds every row.

        Raises:
            UserError: the vectors have another length or are not finite, or ``k`` is below 1.
        """
        queries = self.prepared(vectors, k)
        best, worst = [_Best(k) for _ in queries], np.full(len(queries), -np.inf, dtype=np.float32)
        hidden = {number: self.rows_of(subject) for number, subject in enumerate(subjects or ()) if subject}
        for start, end in _blocks(len(self.vectors), max(SMALLEST_BLOCK, MOST_SCORES // max(len(queries), 1))):
            scores = self.scores(queries, start, end)
            if among is not None:
                scores[:, ~among[start:end]] = -np.inf
            for query, own in hidden.items():
                scores[query, own[(own >= start) & (own < end)] - start] = -np.inf
            for number in np.flatnonzero(scores.max(axis=1) > worst):
                worst[number] = best[number].add(scores[number], start)
        found = [each.padded() for each in best]
        rows, scores = (np.array([each[part] for each in found]).reshape(-1, k) for part in (0, 1))
        return Neighbours(rows.astype(int), (1 - scores).astype(np.float32))

    def prepared(self, vectors: np.ndarray, k: int = 1) -> np.ndarray:
        """Queries (Q, E) standardised and of length 1.

        Raises:
            UserError: see :meth:`search`.
        """
        vectors = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        if vectors.ndim != 2 or vectors.shape[1] != self.store.dimensions or not np.isfinite(vectors).all():
            raise UserError(
                f"Queries {vectors.shape} do not fit {self.store.folder}, or hold NaN.",
                f"Give finite vectors (Q, {self.store.dimensions}) of the encoder that made it.",
            )
        if k < 1:
            raise UserError(f"{k} neighbours were asked for.", "Give 1 or more.")
        return self.standardise(vectors)

    def scores(self, queries: np.ndarray, start: int = 0, end: int | None = None) -> np.ndarray:
        """Cosines (Q, rows) of prepared queries with the rows from ``start`` to ``end``.

        The queries are scaled in place of the rows: q · (x − m)/σ = (q/σ) · x − (q/σ) · m.
        """
        scaled = queries * self.standardise.scale
        scores = scaled @ self.vectors[start:end].T
        scores -= (scaled @ self.standardise.mean)[:, None]
        scores /= self.lengths[start:end]
        return scores

    @cached_property
    def _rows_of_subjects(self) -> dict[str, np.ndarray]:
        names, inverse = np.unique(self.column("subject").astype(str), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        edges = np.searchsorted(inverse[order], np.arange(len(names) + 1))
        return {name: order[a:b] for name, a, b in zip(names, edges[:-1], edges[1:], strict=True)}

    def rows_of(self, subject: str | None) -> np.ndarray:
        """The rows of a subject; none for None."""
        nothing = np.empty(0, dtype=int)
        return nothing if subject is None else self._rows_of_subjects.get(subject, nothing)


class _Best:
    """The best k of many scores; of equal ones those that stand first."""

    def __init__(self, k: int):
        self.k = k
        self.rows, self.scores = np.empty(0, dtype=int), np.empty(0, dtype=np.float32)

    def add(self, scores: np.ndarray, start: int) -> float:
        """Take the scores of the rows from ``start`` on; the score that a later row has to exceed."""
        worst = self.scores[-1] if len(self.scores) == self.k else -np.inf
        better = np.flatnonzero(scores > worst)
        if len(better) > 4 * self.k:
            threshold = np.partition(scores[better], -self.k)[-self.k]
            better = better[scores[better] >= threshold]
        rows = np.concatenate((self.rows, better + start))
        values = np.concatenate((self.scores, scores[better]))
        order = np.lexsort((rows, -values))[: self.k]
        self.rows, self.scores = rows[order], values[order]
        return self.scores[-1] if len(self.scores) == self.k else -np.inf

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores (k,); −1 and −∞ where there are no more."""
        missing = (0, self.k - len(self.rows))
        return np.pad(self.rows, missing, constant_values=-1), np.pad(self.scores, missing, constant_values=-np.inf)


def _blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """First row and end of each block; the first is short, as it shows what later rows have to exceed."""
    edges = [0, *range(min(FIRST_BLOCK, size), rows, min(size, 4 * BLOCK)), rows]
    return ((start, end) for start, end in pairwise(edges) if start < end)


def load_index(folder: str | Path) -> Index:
    """An index that ``nnssl_plugin embed`` made, ready to be searched.

    Args:
        folder: of the index.

    Raises:
        UserError: there is none, or it is damaged or was never finished.
    """
    return Index(VectorStore(folder))


def column_of(store: VectorStore, table: Sequence[Mapping[str, str]], name: str) -> np.ndarray:
    """(N,) cells of a column of a table, as text.

    Raises:
        UserError: there is no such column.
    """
    if name not in store.facts["columns"]:
        raise UserError(f"{store.folder} has no column '{name}'.", f"It has: {', '.join(store.facts['columns'])}.")
    return np.array([row.get(name) or "" for row in table], dtype=object)


def rows_where(store: VectorStore, table: Sequence[Mapping[str, str]], where: Sequence[str]) -> np.ndarray:
    """(N,) bool: the rows for which all conditions ``COLUMN=VALUE`` or ``COLUMN!=VALUE`` hold.

    Raises:
        UserError: a condition reads otherwise, or names no column.
    """
    chosen = np.ones(len(table), dtype=bool)
    for condition in where:
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise UserError(f"'{condition}' is no condition.", 'For example: --where "modality=CT"')
        equal = column_of(store, table, match[1]) == match[3]
        chosen &= equal if match[2] == "=" else ~equal
    return chosen
