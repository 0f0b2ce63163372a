"""Frozen embeddings of slices and texts, computed once, so that training never runs CLIP."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnssl_plugin.captions.clip.pairs import ClipPair, load_pair
from nnssl_plugin.captions.triplets import triplet_pictures
from nnssl_plugin.data.triplets import (
    EMBEDDINGS_FILE,
    PAIR_FOLDER,
    RANDOM_PAIR,
    Embeddings,
    Triplet,
    load_embeddings,
    place_of,
    read_triplets,
    text_sha256,
    write_embeddings,
)
from nnssl_plugin.errors import UserError

BATCH = 32


@dataclass(frozen=True)
class EmbeddingSummary:
    """What :func:`store_embeddings` did."""

    path: Path
    weights: str
    computed: int
    reused: int


@dataclass(frozen=True)
class _Row:
    triplet: Triplet
    key: str
    image: np.ndarray  # (E,)
    text: np.ndarray  # (E,)


def store_embeddings(
    raw_folder: Path, *, model: str | None = None, weights: str | None = None, device: str = "cpu"
) -> EmbeddingSummary:
    """Embed every triplet of a raw dataset into ``clip_embeddings.npz``.

    A row is reused where the weights, the pixels of the slice and the text are those it was made of.

    Args:
        raw_folder: raw dataset with ``triplets.jsonl``.
        model: open_clip's name of the architecture, where ``weights`` needs one.
        weights: file, folder or tag (see ``clip_pairs.load_pair``); None takes a small random pair.
        device: where the encoders run.

    Raises:
        UserError: no triplets, no such weights, or rows made with given weights would be replaced by random ones.
    """
    triplets = read_triplets(raw_folder)
    present = load_embeddings(raw_folder) if (raw_folder / EMBEDDINGS_FILE).is_file() else None
    if weights is None and present is not None and not present.weights.startswith(RANDOM_PAIR):
        tuned = raw_folder / PAIR_FOLDER
        again = tuned if present.weights.startswith(f"{PAIR_FOLDER} ") and tuned.is_dir() else "FILE, FOLDER or TAG"
        raise UserError(
            f"{raw_folder / EMBEDDINGS_FILE} was made with {present.weights}, and no weights are given now.",
            f"Give them again: --weights {again} (or delete the file to go back to random encoders).",
        )
    pair = load_pair(weights=weights, model=model)
    pair.model.to(device)
    known = _known_rows(present)
    pictures = tqdm(triplet_pictures(raw_folder, triplets), total=len(triplets), desc="embed", unit="slice")
    rows: list[_Row] = []
    try:
        for batch in _batches(pictures):
            rows += _embed(batch, pair, known)
    except BaseException:
        _keep_done(raw_folder, rows, present, pair.weights)
        raise
    if not rows:
        raise UserError(f"{raw_folder} has no triplet of a case that it holds.", "Run nnssl_plugin caption again.")
    path = write_embeddings(raw_folder, _table(rows, pair.weights))
    reused = sum(row.key in known for row in rows)
    return EmbeddingSummary(path=path, weights=pair.weights, computed=len(rows) - reused, reused=reused)


def embedding_key(weights: str, picture: np.ndarray, text: str) -> str:
    """SHA-256 over all that a row depends on: the weights, the pixels (H, W, 3) and the text."""
    digest = hashlib.sha256()
    for part in (weights.encode(), repr(picture.shape).encode(), picture.tobytes(), text.encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _keep_done(raw_folder: Path, rows: list[_Row], present: Embeddings | None, weights: str) -> None:
    """Write the rows of a run that was cut off, unless they would replace rows of before that they do not include."""
    if rows and (present is None or (present.weights == weights and len(rows) >= len(present.case))):
        write_embeddings(raw_folder, _table(rows, weights))


def _known_rows(present: Embeddings | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if present is None:
        return {}
    return {str(key): (present.image[row], present.text[row]) for row, key in enumerate(present.key)}


def _batches(pictures: Iterable[tuple[Triplet, np.ndarray]]) -> Iterator[list[tuple[Triplet, np.ndarray]]]:
    iterator = iter(pictures)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _embed(
    batch: list[tuple[Triplet, np.ndarray]], pair: ClipPair, known: dict[str, tuple[np.ndarray, np.ndarray]]
) -> list[_Row]:
    keys = [embedding_key(pair.weights, picture, triplet.text) for triplet, picture in batch]
    new = [position for position, key in enumerate(keys) if key not in known]
    vectors = {key: known[key] for key in keys if key in known}
    if new:
        images, texts = pair.embed([batch[n][1] for n in new], [batch[n][0].text for n in new])
        vectors |= {keys[n]: (image, text) for n, image, text in zip(new, images, texts, strict=True)}
    return [_Row(triplet, key, *vectors[key]) for (triplet, _), key in zip(batch, keys, strict=True)]


def _table(rows: list[_Row], weights: str) -> Embeddings:
    return Embeddings(
        case=np.array([row.triplet.case for row in rows]),
        text_sha256=np.array([text_sha256(row.triplet.text) for row in rows]),
        key=np.array([row.key for row in rows]),
        image=np.stack([row.image for row in rows]),
        text=np.stack([row.text for row in rows]),
        weights=weights,
        place=np.array([place_of(row.triplet) for row in rows]),
    )
