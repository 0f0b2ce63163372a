"""The texts that an encoder was aligned with, and what an index in their space keeps of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.data.triplets import PAIR_FOLDER, RANDOM_PAIR, load_embeddings
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder
from nnssl_plugin.tasks.retrieval.encoder import Alignment

ALIGNMENT_FILE = "alignment.npz"
"""Beside the vectors: ``metric`` (E, E) and ``mean`` (E,) of the texts."""


@dataclass(frozen=True)
class TextSpace:
    """How volumes are compared with the texts of the dataset that an encoder was aligned with."""

    weights: str
    """Name and hash of the pair that embedded them."""
    mean: np.ndarray
    """(E,) of their embeddings."""
    pair: str | None
    """The folder of the pair, where ``nnssl_plugin clip`` left it in the dataset."""
    metric: np.ndarray
    """(E, E) that was learned."""
    centre: bool
    """Whether the training took means off."""


def text_space(dataset: str, alignment: Alignment) -> TextSpace:
    """The space of the texts of a raw dataset.

    Args:
        dataset: its full name.
        alignment: with them.

    Raises:
        UserError: there is no such dataset, its texts have not been embedded, or by random encoders or others.
    """
    folder = raw_dataset_folder(dataset)
    stored = load_embeddings(folder)
    if stored.weights.startswith(RANDOM_PAIR):
        raise UserError(
            f"The texts of {dataset} were embedded by random encoders: they tell slices apart, and no text finds what "
            "it says.",
            f"Train a pair on them and pretrain again: nnssl_plugin clip -d {dataset}",
        )
    if stored.text.shape[1] != alignment.dimensions:
        raise UserError(
            f"The texts of {dataset} have {stored.text.shape[1]} numbers, the encoder was aligned with "
            f"{alignment.dimensions}.",
            "Embed them again by the pair of the pretraining: nnssl_plugin caption -d ID --weights WHERE",
        )
    own = folder / PAIR_FOLDER
    pair = str(own.resolve()) if stored.weights.startswith(f"{PAIR_FOLDER} ") and own.is_dir() else None
    return TextSpace(stored.weights, stored.text.mean(axis=0), pair, alignment.metric, alignment.centre)


def facts_of(space: TextSpace) -> dict[str, Any]:
    """What ``index.json`` says of the space."""
    return {"weights": space.weights, "pair": space.pair, "centre": space.centre}


def keep_space(folder: Path, space: TextSpace) -> None:
    """Write metric and mean beside the vectors of an index."""
    with atomic_path(folder / ALIGNMENT_FILE) as temporary, open(temporary, "wb") as file:
        np.savez(file, metric=space.metric, mean=space.mean)
