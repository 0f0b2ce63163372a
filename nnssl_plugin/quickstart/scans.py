"""Writes what the pipeline starts from: unlabelled scans, and a labelled nnU-Net raw dataset with test cases."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.quickstart.own_scans import (
    LEAST_TRAINING,
    SmallCase,
    choose,
    find_candidates,
    load_small,
    number_labels,
    save_small,
)
from nnssl_plugin.quickstart.phantoms import write_phantoms
from nnssl_plugin.quickstart.steps import TARGET

SHAPE = (24, 40, 32)
SPACING_MM = (2.5, 2.5, 2.5)
UNLABELLED, LABELLED, TEST = 8, 8, 6
"""Number of phantoms of each kind."""
PHANTOM_LABELS = {"liver": 1, "kidneys": 2}


@dataclass(frozen=True)
class Setting:
    """What a quickstart works on; the same in every run in one folder."""

    images: str | None = None
    """Folder of the user's scans; ``None`` generates phantoms."""
    labels: str | None = None
    """Folder of their segmentations."""
    modality: str | None = None
    """``MR`` or ``CT``; ``None`` guesses it."""


@dataclass(frozen=True)
class Selection:
    """Which scans are used for what."""

    modality: str
    pretraining: tuple[str, ...]
    training: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    """Name → value in the labelled dataset."""
    notes: tuple[str, ...] = ()
    """What was left out or made coarser, and what was guessed."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Selection":
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_scans(folder: Path, setting: Setting) -> Selection:
    """Write ``scans/`` and, where there are labels, the raw dataset that a user would bring.

    Both are written anew: an earlier run may have been interrupted here.

    Raises:
        UserError: for folders without scans, and for too few labelled cases.
    """
    shutil.rmtree(folder / "scans", ignore_errors=True)
    shutil.rmtree(folder / "nnUNet_raw" / TARGET, ignore_errors=True)
    if setting.images is None:
        return _write_phantoms(folder, setting)
    return _write_own(folder, setting)


def _write_phantoms(folder: Path, setting: Setting) -> Selection:
    look = {"shape": SHAPE, "spacing_mm": SPACING_MM}
    target = folder / "nnUNet_raw" / TARGET
    paths = write_phantoms(folder / "scans", UNLABELLED, seed=1, **look)
    write_phantoms(target / "imagesTr", LABELLED, seed=2, labels_folder=target / "labelsTr", **look)
    write_phantoms(target / "imagesTs", TEST, seed=3, labels_folder=target / "labelsTs", **look)
    modality = setting.modality or "MR"
    _write_dataset_json(target, modality=modality, labels=PHANTOM_LABELS, training=LABELLED)
    return Selection(
        modality=modality,
        pretraining=tuple(path.name.removesuffix(".nii.gz") for path in paths),
        training=_cases(target / "labelsTr"),
        test=_cases(target / "labelsTs"),
        labels=PHANTOM_LABELS,
    )


def _write_own(folder: Path, setting: Setting) -> Selection:
    candidates, notes = find_candidates(Path(setting.images), Path(setting.labels) if setting.labels else None)
    groups, seen, coarser, ct = [], set(), 0, 0
    *chosen, left_out = choose(candidates)
    notes += left_out
    for group in chosen:
        cases, reasons, made_coarser, like_ct = load_small(group, seen)
        groups.append(cases)
        notes += reasons
        coarser, ct = coarser + made_coarser, ct + like_ct
    test, training, unlabelled = groups
    total = len(test) + len(training) + len(unlabelled)
    if not total:
        raise UserError(f"No scan in {setting.images} can be used: {notes[-1]}", "Give other scans: --images DIR")
    if coarser:
        notes.append(
            f"{coarser} of {total} scans were averaged to a coarser grid so that minutes suffice; everything "
            "here, Dice included, is on that grid."
        )
    modality = setting.modality or ("CT" if 2 * ct > total else "MR")
    if setting.modality is None:
        notes.append(f"Modality {modality}, guessed from the intensities (--modality MR|CT says it).")
    if 0 < ct < total:
        notes.append(f"{ct} of {total} scans look like CT, the others do not: one dataset has one normalisation.")
    for case in (*training, *unlabelled):
        save_small(folder / "scans" / f"{case.case}.nii.gz", case.image, case.affine)
    selection = Selection(modality, tuple(sorted(c.case for c in (*training, *unlabelled))), notes=tuple(notes))
    return _with_labels(folder, selection, training, test) if setting.labels else selection


def _with_labels(folder: Path, selection: Selection, training: list[SmallCase], test: list[SmallCase]) -> Selection:
    if len(training) < LEAST_TRAINING or not test:
        raise UserError(
            f"{len(training) + len(test)} labelled scans can be used; at least {LEAST_TRAINING} for training and one "
            f"for testing, {LEAST_TRAINING + 2} in all, are needed. {' '.join(selection.notes[:1])}".strip(),
            "Label more scans, or leave --labels out: the pipeline then ends with pretraining.",
        )
    numbers, notes = number_labels([*training, *test])
    if not numbers:
        raise UserError("The segmentations hold no label at this resolution.", "Leave --labels out.")
    labels = {f"label_{value}": number for value, number in numbers.items()}
    target = folder / "nnUNet_raw" / TARGET
    for cases, split in ((training, "Tr"), (test, "Ts")):
        for case in cases:
            save_small(target / f"images{split}" / f"{case.case}_0000.nii.gz", case.image, case.affine)
            label = np.zeros(case.label.shape, np.uint8)
            for value, number in numbers.items():
                label[case.label == value] = number
            save_small(target / f"labels{split}" / f"{case.case}.nii.gz", label, case.affine)
    _write_dataset_json(target, modality=selection.modality, labels=labels, training=len(training))
    return Selection(
        modality=selection.modality,
        pretraining=selection.pretraining,
        training=_cases(target / "labelsTr"),
        test=_cases(target / "labelsTs"),
        labels=labels,
        notes=(*selection.notes, *notes),
    )


def _write_dataset_json(folder: Path, *, modality: str, labels: Mapping[str, int], training: int) -> None:
    content = {
        "channel_names": {"0": modality},
        "labels": {"background": 0, **labels},
        "numTraining": training,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    write_json(folder / "dataset.json", content)


def _cases(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name.removesuffix(".nii.gz") for path in folder.iterdir()))
