"""What a classifier sees of a case, and the batch of a step: functions of (seed, step) alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch.utils.data import Dataset, default_collate

from nnssl_plugin.data.windows import random_origin, read_window, resize
from nnssl_plugin.nnunet.case_labels import MULTILABEL, ClassLabels, Label, Target

RESIZE, WINDOWS = STRATEGIES = ("resize", "windows")
NO_CROP, FOREGROUND = CROPS = ("none", "foreground")

Inputs = Callable[..., np.ndarray]
"""``inputs(data, segmentation, rng)`` → (W, C, *size): :func:`case_inputs` with everything else given."""


def class_inputs(
    data, *, patch_size: Sequence[int], strategy: str, windows: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Windows of one case, float32 (W, C, *patch_size).

    ``resize``: W = 1, the whole image resized to the patch, each axis by itself. ``windows``: patches of the case as it
    is, 0 outside. With a patch of two axes a window is a slice of the first spatial axis: resize takes the middle one.

    Args:
        data: (C, z, y, x) of a preprocessed case, array or blosc2 file; windows read no more than they need.
        patch_size: voxels (pixels, for two axes).
        strategy: one of :data:`STRATEGIES`.
        windows: how many windows the strategy ``windows`` takes.
        rng: where the windows lie; ``None`` spreads them evenly, the first in the middle: the same at each call.
    """
    flat = len(patch_size) == 2
    shape = np.array(data.shape[1:])
    if strategy == RESIZE:
        whole = np.asarray(data[:, shape[0] // 2] if flat else data[:])
        return resize(whole, patch_size)[None]
    size = [1, *patch_size] if flat else list(patch_size)
    origins = [random_origin(shape, size, rng) for _ in range(windows)] if rng else even_origins(shape, size, windows)
    read = np.stack([read_window(data, origin, size) for origin in origins])
    return read[:, :, 0] if flat else read


def even_origins(case_shape: Sequence[int], window: Sequence[int], count: int) -> np.ndarray:
    """First voxels (count, dims) of windows that lie evenly in the case, the first in its middle.

    They follow the additive recurrence of the generalised golden ratio (Roberts 2018, "The unreasonable effectiveness
    of quasirandom sequences"): more windows fill the gaps of fewer. Where the window is larger than the case, the case
    is centred in it.
    """
    ratio = 2.0
    for _ in range(32):  # the fixed point of x ** (dims + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (len(window) + 1))
    steps = ratio ** -np.arange(1.0, len(window) + 1)
    places = (0.5 + np.arange(count)[:, None] * steps) % 1
    free = np.array(case_shape) - np.array(window)
    return np.where(free > 0, np.floor(places * (free + 1)), free // 2).astype(int)


def foreground_box(segmentation, *, margin: float) -> tuple[slice, ...]:
    """The box of all labels above 0, with a margin, as slices of the spatial axes; the whole case where there is none.

    Args:
        segmentation: (1, z, y, x) labels, array or blosc2 file.
        margin: on each side, as a fraction of the box's size along the axis.
    """
    found = np.asarray(segmentation[:])[0] > 0
    box = []
    for axis, size in enumerate(found.shape):
        hit = np.flatnonzero(found.any(axis=tuple(a for a in range(found.ndim) if a != axis)))
        if not len(hit):
            return tuple(slice(0, s) for s in found.shape)
        more = int(np.ceil(margin * (hit[-1] + 1 - hit[0])))
        box.append(slice(max(0, int(hit[0]) - more), min(size, int(hit[-1]) + 1 + more)))
    return tuple(box)


def case_inputs(
    data, segmentation, rng: np.random.Generator | None = None, *, crop: str, crop_margin: float, **how: Any
) -> np.ndarray:
    """:func:`class_inputs` of the part of a case that ``crop`` keeps.

    Args:
        data: (C, z, y, x).
        segmentation: (1, z, y, x), read only where ``crop`` is ``foreground``.
        rng: see :func:`class_inputs`.
        crop: one of :data:`CROPS`.
        crop_margin: see :func:`foreground_box`.
        how: the other arguments of :func:`class_inputs`.
    """
    if crop == FOREGROUND:
        data = data[(slice(None), *foreground_box(segmentation, margin=crop_margin))]
    return class_inputs(data, rng=rng, **how)


def label_vector(label: Label, target: Target) -> np.ndarray:
    """A label as the losses take it: the class () int64, or in a multi-label target (K,) float32 of 0 and 1."""
    if target.kind != MULTILABEL:
        return np.int64(label)
    vector = np.zeros(len(target.classes), dtype=np.float32)
    vector[list(label)] = 1
    return vector


def label_matrix(labels: ClassLabels, target: Target, cases: Sequence[str]) -> np.ndarray:
    """:func:`label_vector` of each case: (N,) int64 or (N, K) float32."""
    return np.stack([label_vector(labels.labels[target.name][case], target) for case in cases])


def sampling_weights(labels: ClassLabels, targets: Sequence[Target], cases: Sequence[str]) -> np.ndarray:
    """Probability (N,) to draw each case such that the classes come equally often.

    With several targets it is the mean over them; a multi-label case counts as of the rarest of its labels.
    """
    total = np.zeros(len(cases))
    for target in targets:
        matrix = label_matrix(labels, target, cases)
        if matrix.ndim == 2:  # the absence of every label counts as one more
            matrix = np.concatenate((matrix, ~matrix.any(1, keepdims=True)), 1) > 0
            rarity = np.where(matrix, 1 / np.maximum(1, matrix.sum(0)), 0).max(1)
        else:
            rarity = 1 / np.bincount(matrix)[matrix]
        total += rarity / rarity.sum()
    return total / len(targets)


class ClassCases:
    """Labelled preprocessed cases; picklable.

    Args:
        folder: nnU-Net's folder of preprocessed cases (``…/nnUNetPlans_3d_fullres``).
        cases: names of those to use.
        labels: of at least these cases.
        targets: those that are learned, in the order of a batch's ``target``.
    """

    def __init__(self, folder: str | Path, cases: Sequence[str], *, labels: ClassLabels, targets: Sequence[Target]):
        self.names = sorted(cases)
        self.labels = labels
        self.targets = tuple(targets)
        self.dataset = infer_dataset_class(str(folder))(str(folder), list(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, case: str, inputs: Inputs, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """``data`` (W, C, *size) float32, ``target`` (a label per target) and ``case`` (its name)."""
        data, segmentation, _, _ = self.dataset.load_case(case)
        labels = [label_vector(self.labels.labels[target.name][case], target) for target in self.targets]
        return {"data": inputs(data, segmentation, rng), "target": labels, "case": case}


class TrainingBatches(Dataset):
    """Batch *k* of the training: ``data`` (B, W, C, *patch), ``target`` (one tensor per target), ``case`` (B names).

    Args:
        cases: what to draw from.
        inputs: of one case.
        transform: nnU-Net's augmentation of one window (C, *size) to (C, *patch).
        batch_size: cases per step.
        seed: chooses the stream of randomness.
        weights: probability of each case (in the order of ``cases.names``); ``None`` draws each once per pass.
    """

    def __init__(
        self,
        cases: ClassCases,
        inputs: Inputs,
        *,
        transform: Callable[..., Mapping],
        batch_size: int,
        seed: int,
        weights: np.ndarray | None = None,
    ):
        self.cases = cases
        self.inputs = inputs
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.weights = weights

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 1, step])
        with global_seed(int(rng.integers(2**32))):
            samples = [self._augmented(self.cases.sample(case, self.inputs, rng)) for case in self.cases_of_step(step)]
        return default_collate(samples)

    def cases_of_step(self, step: int) -> list[str]:
        """Names of the step's cases, from passes over all cases: permutations, or draws with ``weights``."""
        number = len(self.cases)
        first = step * self.batch_size
        return [
            self.cases.names[self._order(place // number)[place % number]]
            for place in range(first, first + self.batch_size)
        ]

    def _order(self, number_of_pass: int) -> np.ndarray:
        rng, number = np.random.default_rng([self.seed, 0, number_of_pass]), len(self.cases)
        if self.weights is None:
            return rng.permutation(number)
        return rng.choice(number, size=number, p=self.weights)

    def _augmented(self, sample: dict[str, Any]) -> dict[str, Any]:
        windows = [self.transform(image=torch.from_numpy(window))["image"] for window in sample["data"]]
        return sample | {"data": torch.stack(windows)}


class ValidationBatches(Dataset):
    """Batch *k* of the validation cases, each once and unchanged; the last batch may be smaller.

    Args:
        cases: the validation cases.
        inputs: of one case.
        batch_size: cases per batch.
    """

    def __init__(self, cases: ClassCases, inputs: Inputs, *, batch_size: int):
        self.cases = cases
        self.inputs = inputs
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.cases) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = number * self.batch_size
        return default_collate(
            [self.cases.sample(case, self.inputs) for case in self.cases.names[first : first + self.batch_size]]
        )


@contextmanager
def global_seed(seed: int):
    """Seed the global generators of NumPy and torch, which nnU-Net's augmentation draws from; restore them after."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def repeatable(transform):
    """nnU-Net's augmentation without the blur's choice of algorithm by stop-watch, which no seed can repeat."""
    for part in (transform, *getattr(transform, "transforms", ())):
        while part is not None:
            if hasattr(part, "benchmark"):
                part.benchmark = False
            part = getattr(part, "transform", None)
    return transform
