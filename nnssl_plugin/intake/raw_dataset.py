"""The raw dataset that ``prepare`` fills: its folder, its dataset.json, and which files belong to a case."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.ledger import PROVENANCE_FILE, Origin, read_rows, write_rows
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.dataset_json import read_dataset_file

RAW = "nnUNet_raw"
FILE_ENDING = ".nii.gz"
PICTURE_ENDING = ".png"
MODALITIES_FILE = "modalities.json"
READERS = {FILE_ENDING: "NibabelIOWithReorient", PICTURE_ENDING: "NaturalImage2DIO"}
"""File ending of a dataset → nnU-Net's reader; that of volumes turns every case to RAS."""
RGB = "RGB"
NORMALISATIONS = ("noNorm", "rescale_to_0_1")
"""Channel names by which nnU-Net keeps the values as stored, or brings each image to [0, 1]."""
MODALITIES = {FILE_ENDING: ("MR", "PET", "CT", *NORMALISATIONS), PICTURE_ENDING: ("grey", RGB, "MR", *NORMALISATIONS)}
"""File ending → what the images may be, the default first. nnU-Net normalises by z-score where neither CT nor a
normalisation is named; inside the mask that it crops to, a binary shape then has no contrast left."""


@dataclass(frozen=True)
class DatasetKind:
    """What a dataset holds."""

    channels: tuple[str, ...]  # names in dataset.json, by which nnU-Net normalises
    ending: str = FILE_ENDING
    labelled: bool = False  # with segmentations of the user's instead of body masks
    label_names: tuple[str, ...] = ()  # of the labels 1, 2, …, where they are known

    @property
    def files(self) -> tuple[str, ...]:
        """What each image file of a case holds; a colour image is one file of three channels."""
        return (RGB,) if self.channels == tuple(RGB) else self.channels

    @staticmethod
    def of(modality: str, ending: str) -> "DatasetKind":
        """Of one modality.

        Raises:
            UserError: there is no such modality of these files.
        """
        if modality not in MODALITIES[ending]:
            kind = "2D images" if ending == PICTURE_ENDING else "volumes"
            raise UserError(f"Modality {modality!r} for {kind}.", f"Use one of {', '.join(MODALITIES[ending])}.")
        return DatasetKind(tuple(RGB) if modality == RGB else (modality,), ending)


def dataset_folder(dataset_id: int, name: str) -> Path:
    """The folder ``nnUNet_raw/DatasetXXX_NAME``, which need not exist.

    Raises:
        UserError: nnUNet_raw is not set, the ID or name is not one, the ID belongs to another dataset, or the folder
            was made by something else.
    """
    raw = os.environ.get(RAW)
    if not raw:
        raise UserError(f"{RAW} is not set.", f'Run: export {RAW}="/path/to/{RAW}" (see nnU-Net\'s docs)')
    if not 1 <= dataset_id <= 999:
        raise UserError(f"Dataset ID {dataset_id}.", "Give a number from 1 to 999: -d 501")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"Dataset name {name!r}.", "Use letters, digits, - and _ only: -n Unlabelled")
    folder = Path(raw).absolute() / f"Dataset{dataset_id:03d}_{name}"
    _check_id_is_free(dataset_id, folder.name)
    if folder.exists():
        _check_is_ours(folder)
    return folder


def open_dataset(dataset_id: int, name: str, kind: DatasetKind, *, source: Path) -> Path:
    """The folder of :func:`dataset_folder` for scans that lie in ``source``, made where it does not exist.

    Raises:
        UserError: as there, or the folder holds something else, or lies inside ``source``.
    """
    folder = dataset_folder(dataset_id, name)
    if folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"The dataset {folder} lies inside the input folder.", "Give the folder of the scans alone.")
    if read_rows(folder / PROVENANCE_FILE, Origin):
        _check_is_alike(folder, kind)
        return folder
    if folder.exists():
        (folder / "dataset.json").unlink(missing_ok=True)  # nothing was taken yet: it may become another dataset
    write_rows(folder / PROVENANCE_FILE, Origin, [])
    write_dataset_json(folder, kind, cases=0)
    return folder


def write_dataset_json(folder: Path, kind: DatasetKind, *, cases: int, highest_label: int = 0) -> None:
    """Write dataset.json, or set ``numTraining``, and labels that are new, in the one that is there."""
    path = folder / "dataset.json"
    content = read_dataset_file(path) if path.is_file() else {}
    labels = {"background": 0} if kind.labelled else {"background": 0, "body": 1}
    defaults = {
        "channel_names": channel_names(kind),
        "labels": labels,
        "file_ending": kind.ending,
        "overwrite_image_reader_writer": READERS[kind.ending],
    }
    content = {**defaults, **content, "numTraining": cases}
    highest = max(highest_label, len(kind.label_names))
    values = range(len(content["labels"]), highest + 1) if kind.labelled else ()
    names = dict(enumerate(kind.label_names, 1))
    content["labels"] |= {names.get(value, f"label_{value}"): value for value in values}
    write_json(path, content)


def write_modalities(folder: Path, channels: Mapping[str, Sequence[int]]) -> None:
    """Write modalities.json: which channels each case has; the files of the others are zeros."""
    write_json(folder / MODALITIES_FILE, {case: list(channels[case]) for case in sorted(channels)})


def channel_names(kind: DatasetKind) -> dict[str, str]:
    """``channel_names`` of ``dataset.json``."""
    return {str(number): name for number, name in enumerate(kind.channels)}


def image_path(folder: Path, case: str, ending: str = FILE_ENDING, channel: int = 0) -> Path:
    """Where an image file of a case lies."""
    return folder / "imagesTr" / f"{case}_{channel:04d}{ending}"


def label_path(folder: Path, case: str, ending: str = FILE_ENDING) -> Path:
    """Where the body mask, or segmentation, of a case lies."""
    return folder / "labelsTr" / f"{case}{ending}"


def case_name(relative: str) -> str:
    """A case name from a relative path without its ending: ``siteA/scan 1`` → ``siteA_scan_1``."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", relative).strip("_") or "scan"


def _check_id_is_free(dataset_id: int, name: str) -> None:
    taken = set()
    for variable in (RAW, "nnUNet_preprocessed", "nnUNet_results"):
        folder = os.environ.get(variable)
        if folder and Path(folder).is_dir():
            taken |= {path.name for path in Path(folder).glob(f"Dataset{dataset_id:03d}_*") if path.is_dir()}
    others = sorted(taken - {name})
    if others:
        raise UserError(
            f"Dataset ID {dataset_id} already belongs to {others[0]}.",
            f"Give a free ID with -d, or the same name: -n {others[0].split('_', 1)[1]}",
        )


def _check_is_ours(folder: Path) -> None:
    if not (folder / PROVENANCE_FILE).is_file():
        raise UserError(
            f"{folder} exists and was not made by prepare (it has no {PROVENANCE_FILE}).",
            "Give a free ID with -d; prepare never writes into a dataset that it did not make.",
        )


def _check_is_alike(folder: Path, kind: DatasetKind) -> None:
    path = folder / "dataset.json"
    if not path.is_file():
        return
    content = read_dataset_file(path, needed=("channel_names",))
    if content.get("file_ending", kind.ending) != kind.ending:
        raise UserError(
            f"{folder.name} holds {content['file_ending']} files; these would be {kind.ending}.",
            "Give 2D images and volumes datasets of their own: another ID with -d.",
        )
    if content["channel_names"] != channel_names(kind):
        present, wanted = _as_asked(content["channel_names"].values()), _as_asked(kind.channels)
        raise UserError(
            f"{folder.name} was made with {present}, now {wanted} is asked for.",
            f"Give {present}, or a dataset of another ID: one dataset has one normalisation per channel.",
        )
    if kind.labelled == ("body" in content.get("labels", {})):
        raise UserError(
            f"{folder.name} was made {'without' if kind.labelled else 'with'} --labels.",
            "Do the same again, or give a dataset of another ID.",
        )


def _as_asked(channels: Iterable[str]) -> str:
    """The option that names channels."""
    names = tuple(channels)
    if len(names) == 1 or names == tuple(RGB):
        return f"--modality {RGB if len(names) > 1 else names[0]}"
    return f"--modalities {' '.join(f'{name}=…' for name in names)}"
