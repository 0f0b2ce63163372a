"""Text to volume: texts as queries of an index in the space of the texts that its encoder was aligned with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl_plugin.captions.clip.pairs import load_pair
from nnssl_plugin.data.vector_store import VectorStore
from nnssl_plugin.errors import UserError
from nnssl_plugin.objectives.partial_transport import mahalanobis_cost
from nnssl_plugin.tasks.retrieval.index import Index, Neighbours
from nnssl_plugin.tasks.retrieval.queries import Query
from nnssl_plugin.tasks.retrieval.standardisation import BLOCK
from nnssl_plugin.tasks.retrieval.text_space import ALIGNMENT_FILE

LEAST_LENGTH = 1e-4
"""Of a difference from the mean: below it a vector does not differ, as in the training."""


def text_queries(
    texts: Sequence[str], index: Index, *, weights: str | None = None, model: str | None = None
) -> list[Query]:
    """Texts as queries of an index.

    Args:
        texts: each is a query.
        index: that ``embed --aligned`` made.
        weights: of the pair, as ``nnssl_plugin caption`` takes them; None: where ``nnssl_plugin clip`` left it.
        model: open_clip's name, where the weights need one.

    Raises:
        UserError: the index lies in another space, or the pair is not the one that embedded the texts.
    """
    space = _space_of(index.store)
    where = weights or space["pair"]
    if where is None or not (weights or Path(where).is_dir()):
        raise UserError(
            f"The pair that embedded the texts ({space['weights']}) is not at hand{f' at {where}' if where else ''}.",
            "Name it: --pair FILE, FOLDER or TAG (--pair-model NAME)",
        )
    pair = load_pair(weights=where, model=model)
    if _hash_of(pair.weights) != _hash_of(space["weights"]):
        raise UserError(
            f"{where} is {pair.weights}; the encoder was aligned with {space['weights']}.",
            "Name the pair that embedded the texts of the pretraining: --pair WHERE",
        )
    return [Query(text, vector, None, "") for text, vector in zip(texts, pair.embed_texts(list(texts)), strict=True)]


def search_texts(index: Index, queries: Sequence[Query], k: int, *, among: np.ndarray | None = None) -> Neighbours:
    """The k rows nearest to each text, by the distance of the training: Mahalanobis under the learned metric, between
    unit vectors of what sets rows and texts apart from their means (``method.centre``), or between unit vectors.

    Args:
        index: that ``embed --aligned`` made.
        queries: of :func:`text_queries`.
        k: how many.
        among: (N,) bool, the rows that may be found; None: all.

    Raises:
        UserError: the index lies in another space, or ``k`` is below 1.
    """
    space = _space_of(index.store)
    if k < 1:
        raise UserError(f"{k} neighbours were asked for.", "Give 1 or more.")
    with np.load(index.store.folder / ALIGNMENT_FILE, allow_pickle=False) as stored:
        metric, of_texts = torch.from_numpy(stored["metric"]), stored["mean"]
    of_rows = index.store.statistics()[0]
    texts = torch.from_numpy(_compared(np.stack([query.vector for query in queries]), of_texts, space["centre"]))
    distances = np.empty((len(queries), len(index.vectors)))
    for start in range(0, len(index.vectors), BLOCK):
        rows = torch.from_numpy(_compared(index.vectors[start : start + BLOCK], of_rows, space["centre"]))
        distances[:, start : start + BLOCK] = mahalanobis_cost(texts, rows, metric).numpy()
    if among is not None:
        distances[:, ~among] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    nearest = np.take_along_axis(distances, order, axis=1)
    missing = ((0, 0), (0, k - order.shape[1]))
    numbers = np.pad(np.where(np.isfinite(nearest), order, -1), missing, constant_values=-1)
    return Neighbours(numbers, np.pad(nearest, missing, constant_values=np.inf).astype(np.float32))


def _compared(vectors: np.ndarray, mean: np.ndarray, centre: bool) -> np.ndarray:
    """(n, E) float64 of length 1, of their differences from the mean where the training took it off."""
    found = np.asarray(vectors, dtype=np.float64) - (mean if centre else 0)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), LEAST_LENGTH)


def _space_of(store: VectorStore) -> dict[str, Any]:
    space = store.facts.get("alignment")
    if space is None:
        raise UserError(
            f"{store.folder} holds features of images, which no text can be compared with.",
            "Embed by an encoder that was aligned with texts (Med3DInsight): nnssl_plugin embed --aligned",
        )
    return space


def _hash_of(weights: str) -> str:
    return weights.rpartition("sha256:")[2]
