"""Approximate neighbours of a large index, by FAISS: a graph (HNSW) up to 100,000 rows, cells (IVF) beyond.

Built once and stored beside the vectors; rows that came later are added, and after rows were removed it is built anew.
How many of the true neighbours it finds is measured against exact search when it is built.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, read_json, write_json
from nnssl_plugin.io.lock import locked
from nnssl_plugin.tasks.retrieval.index import Index, Neighbours
from nnssl_plugin.tasks.retrieval.standardisation import BLOCK

FAISS_FILE, FACTS_FILE, LOCK_FILE = "neighbours.faiss", "neighbours.json", "neighbours.lock"
MOST_IN_A_GRAPH = 100_000
LINKS, BUILDING = 32, 80
"""Of HNSW: links of a node, and candidates while building (Malkov and Yashunin 2018: M and efConstruction)."""
WANTED = 0.99
"""Share of the true ten nearest rows that the search effort is raised for, until the most that is tried."""
EFFORTS = (16, 32, 64, 128, 256, 512)
"""Candidates of a search in the graph, or cells that are looked into."""
FEW = 0.1
"""Share of the rows below which a graph or cells lose their way among rows that may not be found."""
PROBES = 200
"""Rows that are searched for, to measure it."""


@dataclass(frozen=True)
class Approximate:
    """The stored neighbours of an index, in memory."""

    index: Index
    faiss_index: Any
    facts: dict[str, Any]
    """``kind``, ``rows``, ``generation``, ``effort``, and ``recall``: share of the true ten nearest rows found."""

    def search(self, vectors: np.ndarray, k: int = 10, *, among: np.ndarray | None = None, subjects=None) -> Neighbours:
        """As :meth:`Index.search`, but some of the nearest rows may be missed; among few rows it is exact."""
        if among is not None and among.mean() < FEW:
            return self.index.search(vectors, k, among=among, subjects=subjects)
        queries = self.index.prepared(vectors, k)
        hidden = [self.index.rows_of(subject) for subject in subjects or [None] * len(queries)]
        wanted = min(k + max((len(own) for own in hidden), default=0), self.facts["rows"])
        scores, rows = _search(self.faiss_index, queries, wanted, self.facts, among)
        found = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf, dtype=np.float32)
        for query, own in enumerate(hidden):
            kept = (rows[query] >= 0) & ~np.isin(rows[query], own)
            number = min(k, int(kept.sum()))
            found[0][query, :number] = rows[query][kept][:k]
            found[1][query, :number] = 1 - scores[query][kept][:k]
        return Neighbours(*found)


def load_approximate(index: Index) -> tuple[Approximate, bool]:
    """The approximate neighbours of an index, built or extended where that is needed; whether they were.

    Raises:
        UserError: FAISS is not installed, or another process is building them.
    """
    faiss, folder = _faiss(), index.store.folder
    if not index.store.rows:
        raise UserError(f"{folder} is empty.", f"Add images: nnssl_plugin index add --index {folder} -i IMAGES")
    stored = read_json(folder / FACTS_FILE, dict) if (folder / FACTS_FILE).is_file() else {}
    current = {"rows": index.store.rows, "generation": index.store.facts["generation"]}
    if stored.items() >= current.items():
        return Approximate(index, faiss.read_index(str(folder / FAISS_FILE)), stored), False
    with locked(folder / LOCK_FILE):
        if stored.get("generation") == current["generation"] and stored["kind"] == _kind(index):
            found = faiss.read_index(str(folder / FAISS_FILE))
        else:
            found = _empty(index)
        for start in range(found.ntotal, len(index.vectors), BLOCK):
            found.add(index.standardise(index.vectors[start : start + BLOCK]))
        facts = {"kind": _kind(index), **current, **_measured(index, found)}
        _store(found, facts, folder)
    return Approximate(index, found, facts), True


def _kind(index: Index) -> str:
    return "hnsw" if index.store.rows <= MOST_IN_A_GRAPH else "ivf"


def _empty(index: Index) -> Any:
    faiss, rows, dimensions = _faiss(), len(index.vectors), index.store.dimensions
    if _kind(index) == "hnsw":
        graph = faiss.IndexHNSWFlat(dimensions, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = BUILDING
        return graph
    cells = int(4 * math.sqrt(rows))
    chosen = np.sort(np.random.default_rng(0).choice(rows, min(rows, 40 * cells), replace=False))
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, cells, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.niter = 10
    inverted.train(index.standardise(index.vectors[chosen]))
    return inverted


def _measured(index: Index, found: Any) -> dict[str, Any]:
    """The least effort of :data:`EFFORTS` that finds the wanted share, and the share that it finds."""
    rows = np.random.default_rng(1).choice(len(index.vectors), min(PROBES, len(index.vectors)), replace=False)
    vectors, k = index.vectors[np.sort(rows)], min(10, len(index.vectors))
    exact = index.search(vectors, k)
    furthest = exact.distances[:, -1:] + 1e-5  # rows at one distance are equally right
    for effort in EFFORTS:
        scores, _ = _search(found, index.standardise(vectors), k, {"effort": effort}, None)
        recall = float(np.mean(1 - scores <= furthest))
        if recall >= WANTED:
            break
    return {"effort": effort, "recall": recall}


def _search(found: Any, queries: np.ndarray, k: int, facts: dict[str, Any], among: np.ndarray | None):
    faiss = _faiss()
    chosen = None if among is None else np.flatnonzero(among).astype(np.int64)
    options: dict[str, Any] = {} if chosen is None else {"sel": faiss.IDSelectorBatch(chosen)}
    if isinstance(found, faiss.IndexIVFFlat):
        options["nprobe"] = min(facts["effort"], found.nlist)
        parameters = faiss.SearchParametersIVF(**options)
    else:
        options["efSearch"] = max(facts["effort"], k)
        parameters = faiss.SearchParametersHNSW(**options)
    return found.search(np.ascontiguousarray(queries, dtype=np.float32), k, params=parameters)


def _store(found: Any, facts: dict[str, Any], folder: Path) -> None:
    with atomic_path(folder / FAISS_FILE) as temporary:
        _faiss().write_index(found, str(temporary))
    write_json(folder / FACTS_FILE, facts)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "Approximate search needs FAISS, which is not installed.",
            'pip install "nnssl_plugin[retrieval]", or search exactly: without --approximate',
        ) from error
    return faiss
