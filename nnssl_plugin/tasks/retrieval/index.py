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
ROUNDING = 1e-5
"""Of products and offsets, relative: what lies so near to the bound is looked at."""
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

        The queries are scaled in place of the rows: q · (x − m)/σ = (q/σ) · x − (q/σ) · m.

        Args:
            vectors: (Q, E) raw vectors of the index's encoder.
            k: how many; fewer come where the index holds fewer.
            among: (N,) bool, the rows that may be found; None: all.
            subjects: one per query, whose rows it does not find; None, for all or one: it finds every row.

        Raises:
            UserError: the vectors have another length or are not finite, or ``k`` is below 1.
        """
        queries = self.prepared(vectors, k)
        scaled = queries * self.standardise.scale
        best = _Best(scaled @ self.standardise.mean, k)
        hidden = {number: self.rows_of(subject) for number, subject in enumerate(subjects or ()) if subject}
        for start, end in _blocks(len(self.vectors), max(SMALLEST_BLOCK, MOST_SCORES // max(len(queries), 1))):
            products = scaled @ self.vectors[start:end].T
            if among is not None:
                products[:, ~among[start:end]] = -np.inf
            for query, own in hidden.items():
                products[query, own[(own >= start) & (own < end)] - start] = -np.inf
            best.add(products, self.lengths[start:end], start)
        return Neighbours(best.rows, 1 - best.scores)

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
    """The best k of each query among the rows seen so far, the best first; of equal ones those that stand first.

    A score is (product − offset) / length. Most products are too small whatever the length of their row: they are left
    out by one comparison each, and scores are computed of the others alone.

    Args:
        offsets: (Q,) of the queries.
        k: how many.
    """

    def __init__(self, offsets: np.ndarray, k: int):
        self.offsets = offsets
        self.rows = np.full((len(offsets), k), -1)
        self.scores = np.full((len(offsets), k), -np.inf, dtype=np.float32)

    def add(self, products: np.ndarray, lengths: np.ndarray, start: int) -> None:
        """Take the products (Q, n) with the rows from ``start`` on, which have not been seen, and their lengths."""
        k, (number, width) = self.rows.shape[1], products.shape
        worst = self.scores[:, -1]
        least = worst * np.where(worst > 0, lengths.min(), lengths.max()) + self.offsets
        least -= ROUNDING * (np.abs(least) + np.abs(self.offsets))
        better = np.flatnonzero(products > least[:, None])
        queries, columns = np.divmod(better, width)
        values = (products.ravel()[better] - self.offsets[queries]) / lengths[columns]
        if len(better) > 4 * self.rows.size and k < width:
            every = np.full((number, width), -np.inf, dtype=np.float32)
            every[queries, columns] = values
            worst = np.nextafter(np.maximum(np.partition(every, -k, axis=1)[:, -k], worst), -np.inf, dtype=np.float32)
        kept = values > worst[queries]
        self._merge(queries[kept], columns[kept] + start, values[kept])

    def _merge(self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        if not len(queries):
            return
        k = self.rows.shape[1]
        touched, counts = np.unique(queries, return_counts=True)
        owners = np.concatenate((np.repeat(touched, k), queries))
        rows = np.concatenate((self.rows[touched].ravel(), rows))
        scores = np.concatenate((self.scores[touched].ravel(), scores))
        order = np.lexsort((rows, -scores, owners))
        first = np.cumsum(counts + k) - (counts + k)  # of each query in that order
        kept = order[first[:, None] + np.arange(k)]
        self.rows[touched], self.scores[touched] = rows[kept], scores[kept]


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
