"""The batch of a step, a function of (seed, rank, step) alone, so that a run can stop and go on anywhere."""

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import cycle

import numpy as np
import torch
from torch.utils.data import Dataset

from nnssl_plugin.data.batch import Batch, Needs, Place
from nnssl_plugin.data.cases import CaseFacts, Cases
from nnssl_plugin.data.triplets import SliceKey, Triplet
from nnssl_plugin.data.windows import (
    fitted_extent,
    random_origin,
    random_place,
    read_labels,
    read_window,
    resize,
    resize_labels,
)
from nnssl_plugin.nnunet.planes import PLANES

RESIZED = ("whole", "fit")
"""Kinds of windows that show a piece of another size than their own."""
SLICES = 7
"""Stream of randomness that draws slices, beside those of cases and windows."""


class StepBatches(Dataset):
    """Batch *k* of one rank; see ``pretext.Batch`` for its content.

    Args:
        cases: what to draw from.
        needs: what the method asks of a batch.
        patch_size: of the plan, in voxels; two numbers for a 2D configuration.
        batch_size: samples per rank and step.
        available: case → (C,) bool, the channels it really has.
        embeddings: key of a triplet → (image (E,), text (E,)), with ``needs.triplets``.
        triplets: case → its triplets, with ``needs.triplets``.
        stream: numbers that choose the stream of randomness: seed and purpose.
        structures: values of the segmentation that name structures; with any, and with ``needs.labels``, batches
            bring ``labels``, in which every value but these and 0 (background) becomes -1.
        rank, ranks: this process among all that train together.
        kind: what the images are called.
    """

    def __init__(
        self,
        cases: Cases,
        needs: Needs,
        *,
        patch_size: Sequence[int],
        batch_size: int,
        available: dict[str, np.ndarray],
        stream: tuple[int, ...],
        embeddings: dict[SliceKey, tuple[np.ndarray, np.ndarray]] | None = None,
        triplets: dict[str, list[Triplet]] | None = None,
        structures: Collection[int] = (),
        rank: int = 0,
        ranks: int = 1,
        kind: str = "images",
    ):
        self.cases = cases
        self.needs = needs
        self.flat = len(patch_size) == 2
        margins = np.broadcast_to(needs.margin, len(patch_size))
        window = [math.ceil(size * margin) for size, margin in zip(patch_size, margins, strict=True)]
        self.window = [1, *window] if self.flat else window
        self.batch_size = batch_size
        self.available = available
        self.embeddings = embeddings
        self.triplets = triplets
        self.known_labels = [0, *structures] if needs.labels and structures else None
        self.stream = stream
        self.rank = rank
        self.ranks = ranks
        self.kind = kind

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([*self.stream, self.rank, step])
        cases = self.cases_of_step(step)
        slices = self.slices_of_step(step) if self.needs.triplets else [None] * len(cases)
        samples: list[dict] = []
        for row, (case, number) in enumerate(zip(cases, slices, strict=True)):
            neighbour = row % self.needs.slices_per_case > 0
            if not neighbour:
                opened = self.cases.load_labelled(case)
            before = samples[-1]["places"] if neighbour else None
            samples.append(self._sample(case, opened, number, rng, before))
        return {"kind": self.kind, **{key: _collate([s[key] for s in samples]) for key in samples[0]}}

    def cases_of_step(self, step: int) -> list[str]:
        """Names of this rank's cases: passes over random permutations, so that no case comes twice in one step unless
        the method wants neighbours."""
        first = self.rank * self.batch_size
        return self.cases_of_all_ranks(step)[first : first + self.batch_size]

    def cases_of_all_ranks(self, step: int) -> list[str]:
        """Names of the cases of a step, rank after rank."""
        neighbours = self.needs.slices_per_case
        of_rank = math.ceil(self.batch_size / neighbours)
        number, together = len(self.cases), of_rank * self.ranks
        steps_per_pass = max(1, number // together)
        order = np.random.default_rng([*self.stream, step // steps_per_pass]).permutation(number)
        first = (step % steps_per_pass) * together
        drawn = [self.cases.identifiers[order[i % number]] for i in range(first, first + together)]
        rows = (
            [case for case in drawn[i : i + of_rank] for _ in range(neighbours)] for i in range(0, together, of_rank)
        )
        return [case for of_one in rows for case in of_one[: self.batch_size]]

    def slices_of_step(self, step: int) -> list[int]:
        """Which of its triplets each of this rank's cases shows."""
        first = self.rank * self.batch_size
        return self.slices_of_all_ranks(step)[first : first + self.batch_size]

    def slices_of_all_ranks(self, step: int) -> list[int]:
        """Which of its triplets each case of a step shows, rank after rank; different ones where a case comes twice.

        All are of one plane, drawn for the step, where the cases have slices of a common one: otherwise the plane,
        which the method is told, would alone tell most slices of a step apart.
        """
        cases = self.cases_of_all_ranks(step)
        rng = np.random.default_rng([*self.stream, SLICES, step, SLICES])
        planes = [{triplet.plane for triplet in self.triplets[case]} for case in set(cases)]
        common = [plane for plane in PLANES if all(plane in found for found in planes)]
        wanted = {common[rng.integers(len(common))]} if common else set(PLANES)
        orders = {case: self._order(case, wanted, rng) for case in dict.fromkeys(cases)}
        return [next(orders[case]) for case in cases]

    def _order(self, case: str, planes: set[str], rng: np.random.Generator) -> Iterator[int]:
        """The case's triplets of some planes in random order, over and over."""
        fitting = [number for number, triplet in enumerate(self.triplets[case]) if triplet.plane in planes]
        return cycle(rng.permutation(fitting).tolist())

    def _sample(
        self, case: str, opened: tuple, number: int | None, rng: np.random.Generator, before: Place | None
    ) -> dict:
        """One row of a batch; ``before`` is the window of the same case that it is a neighbour of."""
        data, segmentation, facts = opened
        slice_ = None if number is None else facts.slices[number]
        if before is None:
            origin, extent, position = self._box(data.shape[1:], facts, slice_, rng)
        else:
            origin, extent, position = self._beside(before, rng), np.array(before.extent), math.nan
        place = Place.of(origin, extent, data.shape[1:])
        image = read_window(data, origin, extent)
        if not self.available[case].all():  # CT normalisation makes another number of the zeros that were stored
            image = np.where(self.available[case][:, None, None, None], image, np.float32(0))
        if self.needs.window in RESIZED:
            image = resize(image, self.window)
        dims = slice(1, None) if self.flat else slice(None)
        sample = {
            "image": image[:, 0] if self.flat else image,
            "available": self.available[case],
            "cases": case,
            "places": place,
            **{name: np.asarray(value, dtype=np.float32)[dims] for name, value in vars(place).items()},
        }
        if self.known_labels is not None:
            labels = self._labels(segmentation, origin, extent)
            sample["labels"] = labels[0] if self.flat else labels
        return sample | ({} if number is None else self._triplet(self.triplets[case][number], slice_[0], position))

    def _box(
        self, shape: Sequence[int], facts: CaseFacts, slice_: tuple[int, float] | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """First voxel and size of the piece of the case that is shown, and the relative position of the slice in it."""
        whole, free = self.needs.window == "whole", self.needs.placement == "free"
        if whole:
            origin, extent = np.zeros(3, dtype=int), np.array(shape)
        else:
            fit = self.needs.window == "fit"
            extent = fitted_extent(shape, self.window, flat=self.flat) if fit else np.array(self.window)
            anchor = self._anchor(facts, slice_, rng)
            origin = random_origin(shape, extent, rng, anchor, placement=self.needs.placement)
            if self.flat:  # the slices after it exist, too
                origin[0] = min(origin[0], max(0, shape[0] - self.needs.slices_per_case))
        if slice_ is None:
            return origin, extent, math.nan
        axis, coordinate = slice_
        if free:
            # a voxel's centre, for every slice alike: the fraction of a voxel would tell slices apart
            position = (random_place(self.window[axis], rng) + 0.5) / self.window[axis]
            inside = np.clip(coordinate, 0, shape[axis] - 1)
            origin[axis] = math.floor(inside + 0.5 - position * extent[axis] + 0.5)
        else:
            position = float(np.clip((coordinate + 0.5 - origin[axis]) / extent[axis], 0, 1))
        return origin, extent, position

    def _beside(self, before: Place, rng: np.random.Generator) -> np.ndarray:
        """First voxel of a neighbour of a window: the next slice in 2D, else moved by up to a quarter of the window."""
        origin, window, shape = map(np.array, (before.origin, before.extent, before.case_shape))
        moved = origin + ([1, 0, 0] if self.flat else rng.integers(-(window // 4), window // 4 + 1))
        return np.where(shape > window, np.clip(moved, 0, np.maximum(shape - window, 0)), origin)

    def _labels(self, segmentation, origin: np.ndarray, extent: np.ndarray) -> np.ndarray:
        """The segmentation (*window) int16 in the window of the image."""
        labels = read_labels(segmentation, origin, extent)
        if self.needs.window in RESIZED:
            labels = resize_labels(labels[None], self.window)
        return np.where(np.isin(labels, self.known_labels), labels, np.int16(-1))

    def _anchor(
        self, facts: CaseFacts, slice_: tuple[int, float] | None, rng: np.random.Generator
    ) -> list[float | None]:
        """What a window must contain: the slice and some body for ``slice``, else a foreground voxel as often as asked;
        ``fit`` also the slice, where there is one."""
        wants_foreground = self.needs.window == "slice" or rng.random() < self.needs.foreground_share
        anchor: list[float | None] = [None, None, None]
        if wants_foreground and len(facts.foreground):
            anchor = [float(v) for v in facts.foreground[rng.integers(len(facts.foreground))]]
        if slice_ is not None and self.needs.window in ("slice", "fit"):
            anchor[slice_[0]] = slice_[1]
        return anchor

    def _triplet(self, triplet: Triplet, axis: int, position: float) -> dict:
        image, text = self.embeddings[triplet.key]
        return {
            "plane": PLANES.index(triplet.plane),
            "slice_axis": axis,
            "slice_position": np.float32(position),
            "image_embedding": np.asarray(image, dtype=np.float32),
            "text_embedding": np.asarray(text, dtype=np.float32),
        }


def _collate(values: list):
    if isinstance(values[0], (str, Place)):
        return values
    return torch.from_numpy(np.stack([np.asarray(v) for v in values]))
