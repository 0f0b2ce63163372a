"""Folders as nnU-Net or the Medical Segmentation Decathlon has them: which file is which channel of which case.

nnU-Net: ``imagesTr/CASE_0000.nii.gz`` per channel; the Decathlon: ``imagesTr/CASE.nii.gz``, 4D where there are several
channels. Both: ``labelsTr/CASE.nii.gz``, and a ``dataset.json`` with the names of channels and labels.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.file_search import matches
from nnssl_plugin.intake.grouping import Grouped
from nnssl_plugin.intake.raw_dataset import FILE_ENDING, MODALITIES, DatasetKind
from nnssl_plugin.intake.tasks import Group, Refusal, Source, name_without_ending
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.dataset_json import DATASET_FILE

TRAINING, LABELS = "imagesTr", "labelsTr"


@dataclass(frozen=True)
class Layout:
    """What ``dataset.json`` says."""

    channels: tuple[str, ...]
    label_names: tuple[str, ...]  # of the labels 1, 2, …
    one_file: bool  # whether a case is one file (Decathlon)

    def kind(self, modality: str | None, *, labelled: bool) -> DatasetKind:
        """What becomes of it.

        Args:
            modality: of a dataset of one channel; None: what its name says, or else MR.
            labelled: whether the labels are taken over.
        """
        if len(self.channels) > 1 and modality is not None:
            raise UserError(
                f"--modality {modality} for {len(self.channels)} channels.", "Leave it out: dataset.json names them."
            )
        known = {name.casefold(): name for name in MODALITIES[FILE_ENDING]}
        names = self.channels
        if len(names) == 1:
            names = DatasetKind.of(modality or known.get(names[0].casefold(), "MR"), FILE_ENDING).channels
        return DatasetKind(names, FILE_ENDING, labelled, self.label_names if labelled else ())


def find_layout(source: Path) -> Layout | None:
    """The layout of a folder; None where it is a folder of scans like any other.

    Raises:
        UserError: its ``dataset.json`` cannot be read, or names no channels.
    """
    path = source / DATASET_FILE
    if not path.is_file() or not (source / TRAINING).is_dir():
        return None
    content = read_json(path, dict)
    named = content.get("channel_names", content.get("modality"))
    if not isinstance(named, dict) or not named or not all(str(number).isdecimal() for number in named):
        raise UserError(f"{path} names no channels.", 'It reads "channel_names": {"0": "T1", "1": "T2"}.')
    channels = tuple(str(named[number]) for number in sorted(named, key=int))
    return Layout(channels, _label_names(content.get("labels")), one_file="channel_names" not in content)


def group_layout(
    scans: Sequence[Path], source: Path, layout: Layout, *, labelled: bool, keep: Sequence[str] = ()
) -> Grouped:
    """The cases of ``imagesTr`` and, where no labels are wanted, of ``imagesTs`` and its like.

    Args:
        scans: of :func:`~nnssl_plugin.intake.file_search.find_scans`.
        source: the input folder.
        layout: of :func:`find_layout`.
        labelled: take ``labelsTr``, and leave out what has no labels.
        keep: patterns of scans that are never set aside.
    """
    images: dict[str, list[Source]] = defaultdict(list)
    labels, refusals, left_out = {}, [], 0
    for scan in scans:
        relative = scan.relative_to(source)
        folder, stem = relative.parent.as_posix(), name_without_ending(Path(relative.name))
        if labelled and folder == LABELS:
            labels[stem] = Source(scan, relative, keep=True)
        elif folder != TRAINING and (labelled or not re.fullmatch(r"images[A-Z]\w*", folder)):
            left_out += 1
        else:
            case, channels = _place(stem, layout)
            if channels is None:
                names = f"_0000 to _{len(layout.channels) - 1:04d}"
                refusals.append(
                    Refusal(str(scan), f"its name says no channel of dataset.json: it ends in none of {names}")
                )
                continue
            kept = matches(relative.as_posix(), keep)
            images[case if folder == TRAINING else f"{folder}/{case}"].append(Source(scan, relative, channels, kept))
    groups = []
    for case, files in sorted(images.items()):
        if labelled and case not in labels:
            refusals += [Refusal(str(file.path), f"no segmentation for its case: {case}") for file in files]
        else:
            ordered = sorted(files, key=lambda file: file.channels)
            groups.append(Group(case, tuple(ordered), labels.get(case)))
    return Grouped(tuple(groups), tuple(refusals), left_out)


def _place(stem: str, layout: Layout) -> tuple[str, tuple[int, ...] | None]:
    """Case and channels of an image; None for these where its name says none."""
    if layout.one_file:
        return stem, tuple(range(len(layout.channels)))
    named = re.fullmatch(r"(.+)_(\d{4})", stem)
    if named is None or int(named[2]) >= len(layout.channels):
        return stem, None
    return named[1], (int(named[2]),)


def _label_names(labels: Any) -> tuple[str, ...]:
    """Names of the labels 1, 2, …, from ``{"NAME": 1}`` (nnU-Net v2) or ``{"1": "NAME"}``; none for regions."""
    if not isinstance(labels, dict):
        return ()
    by_value = {}
    for key, value in labels.items():
        name, number = (value, key) if str(key).isdecimal() and isinstance(value, str) else (key, value)
        if not str(number).isdecimal():
            return ()
        by_value[int(number)] = str(name)
    return tuple(by_value.get(number, f"label_{number}") for number in range(1, max(by_value, default=0) + 1))
