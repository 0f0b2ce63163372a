"""The slice–text pairs of a raw dataset as CLIP reads them, made once and kept in memory, and who is held out."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnssl_plugin.captions.clip.pairs import ClipPair
from nnssl_plugin.captions.triplets import triplet_pictures
from nnssl_plugin.data.triplets import read_triplets
from nnssl_plugin.errors import UserError

FEWEST_CASES = 10


@dataclass(frozen=True)
class SliceTexts:
    """N pairs, sorted by case, plane and slice; images and tokens as the encoders take them, up to scaling."""

    cases: list[str]
    texts: list[str]
    images: Tensor  # (N, 3, S, S) uint8
    tokens: Tensor  # (N, L) int64
    same_text: Tensor  # (N,) int64: equal numbers where the texts are equal

    def fingerprint(self) -> str:
        """SHA-256 over cases, texts and pixels."""
        digest = hashlib.sha256(json.dumps([self.cases, self.texts]).encode())
        digest.update(self.images.numpy().tobytes())
        return digest.hexdigest()


def prepare_pairs(raw_folder: Path, pair: ClipPair) -> SliceTexts:
    """Cut, resize and tokenise every triplet of a raw dataset.

    Raises:
        UserError: no triplets, or those of fewer than :data:`FEWEST_CASES` cases.
    """
    triplets = sorted(read_triplets(raw_folder), key=lambda triplet: triplet.key)
    pictures = tqdm(triplet_pictures(raw_folder, triplets), total=len(triplets), desc="prepare", unit="slice")
    made = [(triplet, _resized(picture, pair)) for triplet, picture in pictures]
    cases = len({triplet.case for triplet, _ in made})
    if cases < FEWEST_CASES:
        raise UserError(
            f"{raw_folder} has slice–text pairs of {cases} cases; encoders are fine-tuned on {FEWEST_CASES} or more, "
            "of which some are held out.",
            "Prepare and caption more scans, or embed with the encoders as they are: nnssl_plugin caption",
        )
    texts = [triplet.text for triplet, _ in made]
    return SliceTexts(
        cases=[triplet.case for triplet, _ in made],
        texts=texts,
        images=torch.stack([image for _, image in made]),
        tokens=pair.tokenise(texts),
        same_text=torch.from_numpy(np.unique(np.asarray(texts), return_inverse=True)[1].astype(np.int64)),
    )


def scaled(images: Tensor, pair: ClipPair) -> Tensor:
    """What the encoder reads, (N, 3, S, S) float32, from prepared images (N, 3, S, S) uint8."""
    normalise = pair.transform.transforms[-1]
    return normalise(images.float().div(255))


def split_cases(cases: list[str], holdout: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training pairs and of the held-out ones, each sorted; no case stands on both sides.

    Args:
        cases: the case of each pair.
        holdout: share of the cases that is held out, in (0, 0.5]; rounded up, and at least 2 cases.
        seed: draws them; the order of the pairs does not matter.
    """
    distinct = sorted(set(cases))
    count = max(math.ceil(holdout * len(distinct) - 1e-9), 2)
    drawn = np.random.default_rng(seed).permutation(len(distinct))[:count]
    held_out = {distinct[position] for position in drawn}
    is_held_out = np.array([case in held_out for case in cases])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def epoch_batches(positions: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch: a permutation that depends on (seed, epoch) alone, in pieces of nearly equal size."""
    order = np.random.default_rng([seed, epoch]).permutation(positions)
    return np.array_split(order, math.ceil(len(order) / batch_size))


def _resized(picture: np.ndarray, pair: ClipPair) -> Tensor:
    """(3, S, S) uint8: everything that the pair's transform does before it scales to mean 0."""
    from PIL import Image

    image = Image.fromarray(picture)
    for step in pair.transform.transforms[:-1]:
        image = step(image)
    return image.mul(255).round().to(torch.uint8)
