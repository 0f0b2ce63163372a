"""Vectors as they are compared: standardised by the frozen statistics of an index, and of length 1."""

from collections.abc import Iterator

import numpy as np

BLOCK = 4096
"""Vectors that are in memory at once."""


def statistics_of(vectors: np.ndarray) -> np.ndarray:
    """Mean and standard deviation (2, E) float64 of vectors (N, E), block by block (Chan et al. 1979)."""
    count, mean, squares = 0, np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
    for block in blocks_of(vectors):
        own = block.astype(np.float64)
        number, centre = len(own), own.mean(axis=0)
        shift = centre - mean
        squares += ((own - centre) ** 2).sum(axis=0) + shift**2 * count * number / (count + number)
        mean = mean + shift * number / (count + number)
        count += number
    return np.stack((mean, np.sqrt(squares / max(count, 1))))


def blocks_of(vectors: np.ndarray, size: int = BLOCK) -> Iterator[np.ndarray]:
    """The vectors (N, E), some rows after the other."""
    for start in range(0, len(vectors), size):
        yield np.asarray(vectors[start : start + size])


class Standardisation:
    """(x − mean) / standard deviation of each number of a vector, then its length 1.

    Numbers that were the same in every vector (or all but) say nothing and become 0. Networks of tokens are compared
    as they are (M3Ret, section 3.1): their mean is 0 here and their deviation 1.

    Args:
        statistics: (2, E), or None: as they are.
        dimensions: E.
    """

    def __init__(self, statistics: np.ndarray | None, dimensions: int):
        mean, deviation = (np.zeros(dimensions), np.ones(dimensions)) if statistics is None else statistics
        usable = deviation > 1e-6 * np.maximum(np.abs(mean), np.median(deviation))
        self.mean = mean.astype(np.float32)
        self.scale = np.where(usable, 1 / np.where(usable, deviation, 1), 0).astype(np.float32)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(n, E) float32 of length 1; a vector that equals the mean stays 0."""
        moved = (np.asarray(vectors, dtype=np.float32) - self.mean) * self.scale
        lengths = np.linalg.norm(moved, axis=1, keepdims=True)
        return moved / np.where(lengths > 0, lengths, 1)
