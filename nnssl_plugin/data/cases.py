"""nnU-Net's preprocessed cases, with the few facts per case that sampling needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl_plugin.data.triplets import Triplet
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.slice_positions import slice_in_case

FOREGROUND_POINTS = 256
"""Foreground voxels remembered per case: enough to place windows, small enough to keep for every case."""


@dataclass(frozen=True)
class CaseFacts:
    """What is remembered of a case after its first use in a process."""

    foreground: np.ndarray
    """(n, 3) voxels of any label, n may be 0."""
    slices: tuple[tuple[int, float], ...] = ()
    """Axis and coordinate of the slice of each triplet (``slice_positions.slice_in_case``), in the triplets' order."""


class Cases:
    """The preprocessed cases of one configuration; picklable, reads nothing before the first case is asked for.

    Args:
        folder: nnU-Net's folder of preprocessed cases (``…/nnUNetPlans_3d_fullres``).
        identifiers: names of the cases to use.
        transpose_forward: of the plan.
        triplets: case → its triplets, where the method needs them.
    """

    def __init__(
        self,
        folder: str | Path,
        identifiers: Sequence[str],
        *,
        transpose_forward: Sequence[int],
        triplets: dict[str, list[Triplet]] | None = None,
    ):
        self.identifiers = sorted(identifiers)
        self._dataset = infer_dataset_class(str(folder))(str(folder), list(self.identifiers))
        self._transpose_forward = tuple(transpose_forward)
        self._triplets = triplets
        self._facts: dict[str, CaseFacts] = {}

    def __len__(self) -> int:
        return len(self.identifiers)

    def load(self, case: str):
        """The lazily read image (C, z, y, x) of a case and its facts."""
        data, _, facts = self.load_labelled(case)
        return data, facts

    def load_labelled(self, case: str):
        """The lazily read image (C, z, y, x) and segmentation (1, z, y, x) of a case, and its facts."""
        data, segmentation, _, properties = self._dataset.load_case(case)
        if case not in self._facts:
            self._facts[case] = self._remember(case, properties, data.shape[1:])
        return data, segmentation, self._facts[case]

    def _remember(self, case: str, properties: dict, case_shape: Sequence[int]) -> CaseFacts:
        locations = [np.asarray(v) for v in properties.get("class_locations", {}).values() if len(v)]
        points = np.concatenate(locations)[:, 1:] if locations else np.empty((0, 3), dtype=int)
        foreground = points[:: max(1, len(points) // FOREGROUND_POINTS)][:FOREGROUND_POINTS]
        if self._triplets is None:
            return CaseFacts(foreground)
        slices = (
            slice_in_case(
                triplet.slice,
                triplet.plane,
                properties=properties,
                transpose_forward=self._transpose_forward,
                case_shape=case_shape,
            )
            for triplet in self._triplets[case]
        )
        return CaseFacts(foreground, tuple(slices))


def largest_shape(folder: str | Path) -> tuple[int, int, int]:
    """The smallest size, in voxels along the plan's axes, into which every preprocessed case of a configuration fits.

    Args:
        folder: nnU-Net's folder of preprocessed cases.

    Raises:
        UserError: when it holds no case.
    """
    dataset = infer_dataset_class(str(folder))(str(folder))
    shapes = [dataset.load_case(case)[0].shape[1:] for case in dataset.identifiers]
    if not shapes:
        raise UserError(f"{folder} holds no preprocessed case.", "nnUNetv2_plan_and_preprocess -d ID -c 3d_fullres")
    first, second, third = (max(sizes) for sizes in zip(*shapes, strict=True))
    return int(first), int(second), int(third)


def available_channels(raw_folder: str | Path, identifiers: Sequence[str], channels: int) -> dict[str, np.ndarray]:
    """Which channels each case really has, (channels,) bool, from ``modalities.json`` of the raw dataset.

    Cases that the file does not name, or all where there is no such file, have every channel.
    """
    path = Path(raw_folder) / "modalities.json"
    listed = _listed_channels(path)
    available = {}
    for case in identifiers:
        present = listed.get(case, range(channels))
        if not all(0 <= c < channels for c in present):
            raise UserError(f"{path} gives case {case} the channels {list(present)}; the dataset has {channels}.")
        available[case] = np.isin(np.arange(channels), list(present))
    return available


def first_channels(raw_folder: str | Path) -> dict[str, int]:
    """Case → the first channel that it really has, for the cases that ``modalities.json`` of the raw dataset names."""
    return {case: min(present) for case, present in _listed_channels(Path(raw_folder) / "modalities.json").items()}


def _listed_channels(path: Path) -> dict[str, list[int]]:
    listed = read_json(path, dict) if path.is_file() else {}
    for case, present in listed.items():
        if not isinstance(present, list) or not present or not all(isinstance(c, int) and c >= 0 for c in present):
            raise UserError(f"{path} gives case {case} the channels {present!r}.", "Write a list such as [0, 2].")
    return listed
