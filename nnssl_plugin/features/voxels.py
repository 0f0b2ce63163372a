"""What a linear readout of an encoder's maps finds in whole cases: fitting it voxel by voxel, and its Dice.

The encoder stays as it is. Every voxel is described by the maps of all stages, read at its place (a hypercolumn:
Hariharan et al., Hypercolumns for Object Segmentation and Fine-grained Localization, CVPR 2015), and its class is
predicted by ridge regression, which has one solution: no schedule, no learning rate, no seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.data.cases import Cases
from nnssl_plugin.features.hypercolumns import SLAB_VALUES, Maps, encoded, hypercolumns, slabs
from nnssl_plugin.features.ridge import GROUPS, Readout, RidgeSums, balanced_weights
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.labels import structure_labels
from nnssl_plugin.nnunet.plans import resolve_configuration

VOXELS = 10_000
"""Most voxels of each class that a training case gives, drawn evenly: more of one case say the same again."""
SEED = 12345
"""Of the drawn voxels and of shuffled labels."""
UNKNOWN = -1


@dataclass(frozen=True)
class Draw:
    """The labels that a readout may see."""

    cases: tuple[str, ...]
    shuffled: bool = False
    """Whether the labels of each case are exchanged among its voxels at random: what is left is no anatomy."""


class LabelledVoxels:
    """The cases of a labelled, preprocessed dataset, for readouts of any encoder of a plan.

    Args:
        folder: of the dataset in nnUNet_preprocessed.
        plans: the plan.
        configuration: one of its configurations.
        dataset_json: nnU-Net's.
        cases: names of all cases that are used.
    """

    def __init__(
        self,
        folder: Path,
        plans: Mapping[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        cases: Sequence[str],
    ):
        planned = resolve_configuration(plans, configuration)
        self.patch = tuple(planned["patch_size"])
        self.names = structure_labels(dataset_json)
        self._values = np.array([0, *sorted(self.names)])
        self._cases = Cases(
            folder / planned["data_identifier"], sorted(set(cases)), transpose_forward=plans["transpose_forward"]
        )

    @property
    def structures(self) -> list[str]:
        """Names of the K - 1 classes beside the background, in the order of their values."""
        return [self.names[int(value)] for value in self._values[1:]]

    def labels(self, case: str) -> np.ndarray:
        """Numbers of the classes (z, y, x) int16, 0 the background; ``UNKNOWN`` where the segmentation names none.

        nnU-Net's -1, outside of what preprocessing took for the body, is background as in its training.
        """
        segmentation = np.asarray(self._cases.load_labelled(case)[1])[0].astype(np.int16)
        segmentation[segmentation == -1] = 0
        index = np.searchsorted(self._values, segmentation).clip(max=len(self._values) - 1)
        return np.where(self._values[index] == segmentation, index, UNKNOWN).astype(np.int16)

    def fit(self, backbone: Backbone, draws: Sequence[Draw], *, device: str = "cpu") -> list[Readout]:
        """A readout for each draw of labels, all by one pass over their cases; every class weighs the same.

        Args:
            backbone: in test mode; it is moved to the device.
            draws: training cases.
            device: where the encoder runs and, but on mps, the sums are.
        """
        backbone.to(device)
        exact = torch.device("cpu" if device == "mps" else device)  # mps has no float64
        sums = [self._empty_sums(sum(backbone.channels), draw, exact) for draw in draws]
        for number, case in enumerate(sorted({case for draw in draws for case in draw.cases})):
            users = [(draw, each) for draw, each in zip(draws, sums, strict=True) if case in draw.cases]
            labels = {kind: self._sampled(case, number, kind) for kind in {draw.shuffled for draw, _ in users}}
            data = self._cases.load(case)[0]
            for maps in encoded(backbone, data, self.patch, device=torch.device(device), case=case):
                for kind, of_case in labels.items():
                    chosen = [(draw.cases.index(case), each) for draw, each in users if draw.shuffled == kind]
                    for window, known in enumerate(_taken(of_case, maps, self.patch)):
                        _add(backbone, maps.features, window, known, chosen)
        return [each.solve() for each in sums]

    def dice(
        self, backbone: Backbone, readouts: Sequence[Readout], cases: Sequence[str], *, device: str = "cpu"
    ) -> np.ndarray:
        """Dice (R, N, K - 1) of each readout, case and structure; NaN where neither reference nor prediction has any.

        Cases are whole, at the plan's spacing. The readouts act on the coarse maps, which are then read at the voxels:
        the same as the other way round, as both are linear.

        Args:
            backbone: in test mode; it is moved to the device.
            readouts: of this encoder.
            cases: names of N cases.
            device: where the encoder runs.
        """
        backbone.to(device)
        weight = torch.cat([readout.weight for readout in readouts], 1).float().to(device)
        bias = torch.stack([readout.bias for readout in readouts]).float().to(device)
        weights = weight.split(list(backbone.channels))
        scores = []
        for case in cases:
            truth = self.labels(case)
            predicted = np.zeros((len(readouts), *truth.shape), dtype=np.int16)
            data = self._cases.load(case)[0]
            for maps in encoded(backbone, data, self.patch, device=torch.device(device), case=case):
                projected = [torch.einsum("bc...,ck->bk...", f, w) for f, w in zip(maps.features, weights, strict=True)]
                found = torch.cat([_classes(stages, bias) for _, stages in slabs(backbone, projected, self.patch)], 2)
                for window, box, inner in zip(found.cpu().numpy(), maps.boxes, maps.inner, strict=True):
                    target = predicted[(slice(None), *box)]
                    target[:] = window[(slice(None), *inner)].reshape(target.shape)
            scores.append([_dice(truth, each, len(self._values)) for each in predicted])
        return np.array(scores).reshape(len(cases), len(readouts), -1).swapaxes(0, 1)

    def _empty_sums(self, features: int, draw: Draw, device: torch.device) -> RidgeSums:
        counts = torch.zeros(len(self._values))
        for case in draw.cases:
            labels = self.labels(case)
            counts += torch.from_numpy(np.bincount(labels[labels >= 0], minlength=len(self._values)).clip(max=VOXELS))
        return RidgeSums(features, balanced_weights(counts), groups=min(GROUPS, len(draw.cases)), device=device)

    def _sampled(self, case: str, number: int, shuffled: bool) -> np.ndarray:
        """Labels (z, y, x) of a case with no more than :data:`VOXELS` of a class, the others unknown."""
        rng, labels = np.random.default_rng([SEED, number]), self.labels(case)
        known = labels >= 0
        if shuffled:
            labels[known] = rng.permutation(labels[known])
        for value in range(len(self._values)):
            places = np.flatnonzero(labels == value)
            if len(places) > VOXELS:
                labels.reshape(-1)[rng.choice(places, len(places) - VOXELS, replace=False)] = UNKNOWN
        return labels


def _taken(labels: np.ndarray, maps: Maps, patch: Sequence[int]) -> np.ndarray:
    """Labels (B, *patch) under some windows, taken out of those of the case so that no voxel counts twice."""
    windows = np.full((len(maps.boxes), *patch), UNKNOWN, dtype=np.int16)
    for window, box, inner in zip(windows, maps.boxes, maps.inner, strict=True):
        window[inner] = labels[box].reshape(window[inner].shape)
        labels[box] = UNKNOWN
    return windows


def _add(
    backbone: Backbone,
    features: Sequence[Tensor],
    window: int,
    labels: np.ndarray,
    users: Sequence[tuple[int, RidgeSums]],
) -> None:
    """Add the voxels of one window whose labels (*patch) are known to the sums, each with its number of the case."""
    places, known = np.argwhere(labels >= 0), labels[labels >= 0]
    order = np.argsort(known, kind="stable")
    places, known = places[order].astype(np.float32), known[order]
    together = max(1, SLAB_VALUES // sum(backbone.channels))
    for start in range(0, len(known), together):
        part = known[start : start + together]
        voxels = torch.from_numpy(places[start : start + together]).to(features[0].device)
        columns = hypercolumns(backbone, features, window, voxels).to(users[0][1].device).double()
        columns = torch.cat((columns, columns.new_ones(len(columns), 1)), 1)
        for label in np.unique(part).tolist():
            first, last = np.searchsorted(part, (label, label + 1))
            chosen = columns[first:last]
            moments, total = chosen.mT @ chosen, chosen.sum(0)
            for number, sums in users:
                sums.add(moments, total, label=label, group=number % sums.groups)


def _classes(stages: Sequence[Tensor], bias: Tensor) -> Tensor:
    """The class (B, R, rows, ...) of the greatest score, from what each stage adds (B, R · K, rows, ...)."""
    total = torch.stack(list(stages)).sum(0).unflatten(1, bias.shape) + bias.reshape(
        *bias.shape, *[1] * (stages[0].ndim - 2)
    )
    best, found = total[:, :, 0], torch.zeros_like(total[:, :, 0], dtype=torch.int16)
    for label in range(1, bias.shape[1]):  # argmax over an inner axis is slow on a CPU
        better = total[:, :, label] > best
        best, found = torch.where(better, total[:, :, label], best), found.masked_fill(better, label)
    return found


def _dice(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    known = truth >= 0
    pairs = truth[known].astype(int) * classes + predicted[known]
    table = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both, sizes = table.diagonal()[1:], (table.sum(0) + table.sum(1))[1:]
    return np.divide(2 * both, sizes, out=np.full(classes - 1, np.nan), where=sizes > 0)
