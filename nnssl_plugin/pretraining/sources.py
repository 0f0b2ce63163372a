"""Several datasets in one pretraining: what a plan says of each, and which one a step draws from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.settings import Count, Positive, Range

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it modulo 1 spread over [0, 1) more evenly than random numbers, however many are taken."""
ORDER = 11
"""Stream of randomness that shifts the order of sources, beside those of the batches."""


@dataclass(frozen=True)
class DataSource:
    """A preprocessed nnU-Net dataset that a pretraining draws from: an entry of ``pretraining.sources``."""

    dataset: str
    """ID or full name."""
    plans: str = "nnUNetPlans"
    """Its plan, whose preprocessing and patch size hold for its images."""
    configuration: str = "3d_fullres"
    """Of that plan."""
    kind: str | None = None
    """What the method and the log call its batches; sources may share one. ``null`` is the dataset's full name."""
    batch_size: Count | None = None
    """Samples per rank and step; ``null`` is that of the ``pretraining`` block, or else the configuration's."""
    weight: Positive = 1.0
    """Share of the steps, relative to the other sources."""
    fold: Annotated[int, Range(ge=0)] | Literal["all"] | None = None
    """Fold of its ``splits_final.json``, or ``all`` cases; ``null`` is the fold of the run."""

    def __post_init__(self) -> None:
        if self.kind is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.kind):
            raise UserError(
                f"The kind {self.kind!r} of the source {self.dataset} cannot name numbers and pictures.",
                "Use letters, digits and . _ - (for example: ultrasound).",
            )


def sources_of_steps(weights: Sequence[float], seed: int, steps: int) -> np.ndarray:
    """Number of the source (steps,) that each of the first steps draws from: a function of (seed, step) alone.

    Every stretch of steps has each source about in proportion to its weight: the sources share [0, 1) by their
    weights, and step *k* takes the one at the fractional part of ``shift + k · (√5 - 1) / 2``.
    """
    shift = np.random.default_rng([seed, ORDER]).random()
    ends = np.cumsum(weights) / np.sum(weights)
    found = np.searchsorted(ends, (shift + np.arange(steps) * GOLDEN) % 1, side="right")
    return np.minimum(found, len(weights) - 1)
