"""The raw dataset that ``prepare`` fills: its folder, its dataset.json, and which files belong to a case."""

import os
import re
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.ledger import PROVENANCE_FILE, Origin, read_rows, write_rows
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.dataset_json import read_dataset_file

RAW = "nnUNet_raw"
FILE_ENDING = ".nii.gz"
PICTURE_ENDING = ".png"
READERS = {FILE_ENDING: "NibabelIOWithReorient", PICTURE_ENDING: "NaturalImage2DIO"}
"""File ending of a dataset → nnU-Net's reader; that of volumes turns every case to RAS."""
RGB = "RGB"
NORMALISATIONS = ("noNorm", "rescale_to_0_1")
"""Channel names by which nnU-Net keeps the values as stored, or brings each image to [0, 1]."""
MODALITIES = {FILE_ENDING: ("MR", "PET", "CT", *NORMALISATIONS), PICTURE_ENDING: ("grey", RGB, "MR", *NORMALISATIONS)}
"""File ending → what the images may be, the default first. nnU-Net normalises by z-score where neither CT nor a
normalisation is named; inside the mask that it crops to, a binary shape then has no contrast left."""


def open_dataset(dataset_id: int, name: str, *, modality: str, source: Path, ending: str = FILE_ENDING) -> Path:
    """The folder ``nnUNet_raw/DatasetXXX_NAME`` for scans that lie in ``source``, made where it does not exist.

    Raises:
        UserError: nnUNet_raw is not set, the ID or name is not one, the ID belongs to another dataset, or the folder
            was made by something else or for another modality, or lies inside ``source``.
    """
    raw = os.environ.get(RAW)
    if not raw:
        raise UserError(f"{RAW} is not set.", f'Run: export {RAW}="/path/to/{RAW}" (see nnU-Net\'s docs)')
    if not 1 <= dataset_id <= 999:
        raise UserError(f"Dataset ID {dataset_id}.", "Give a number from 1 to 999: -d 501")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"Dataset name {name!r}.", "Use letters, digits, - and _ only: -n Unlabelled")
    if modality not in MODALITIES[ending]:
        kind = "2D images" if ending == PICTURE_ENDING else "volumes"
        raise UserError(f"Modality {modality!r} for {kind}.", f"Use one of {', '.join(MODALITIES[ending])}.")
    folder = Path(raw).absolute() / f"Dataset{dataset_id:03d}_{name}"
    _check_id_is_free(dataset_id, folder.name)
    if folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"The dataset {folder} lies inside the input folder.", "Give the folder of the scans alone.")
    if folder.exists():
        _check_is_ours(folder)
        if read_rows(folder / PROVENANCE_FILE, Origin):
            _check_is_alike(folder, modality=modality, ending=ending)
            return folder
        (folder / "dataset.json").unlink(missing_ok=True)  # nothing was taken yet: it may become another dataset
    write_rows(folder / PROVENANCE_FILE, Origin, [])
    write_dataset_json(folder, modality=modality, cases=0, ending=ending)
    return folder


def write_dataset_json(folder: Path, *, modality: str, cases: int, ending: str = FILE_ENDING) -> None:
    """Write dataset.json, or set ``numTraining`` in the one that is there."""
    path = folder / "dataset.json"
    content = read_dataset_file(path) if path.is_file() else {}
    defaults = {
        "channel_names": channel_names(modality),
        "labels": {"background": 0, "body": 1},
        "file_ending": ending,
        "overwrite_image_reader_writer": READERS[ending],
    }
    write_json(path, {**defaults, **content, "numTraining": cases})


def channel_names(modality: str) -> dict[str, str]:
    """``channel_names`` of ``dataset.json``: one, or red, green and blue."""
    return dict(zip("012", RGB, strict=True)) if modality == RGB else {"0": modality}


def image_path(folder: Path, case: str, ending: str = FILE_ENDING) -> Path:
    """Where the one image file of a case lies."""
    return folder / "imagesTr" / f"{case}_0000{ending}"


def label_path(folder: Path, case: str, ending: str = FILE_ENDING) -> Path:
    """Where the body mask of a case lies."""
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


def _check_is_alike(folder: Path, *, modality: str, ending: str) -> None:
    path = folder / "dataset.json"
    if not path.is_file():
        return
    content = read_dataset_file(path, needed=("channel_names",))
    if content.get("file_ending", ending) != ending:
        raise UserError(
            f"{folder.name} holds {content['file_ending']} files; these would be {ending}.",
            "Give 2D images and volumes datasets of their own: another ID with -d.",
        )
    if content["channel_names"] != channel_names(modality):
        names = list(content["channel_names"].values())
        present = RGB if names == list(RGB) else names[0]
        raise UserError(
            f"{folder.name} was made with --modality {present}, now {modality} is asked for.",
            f"Give --modality {present}, or a dataset of another ID: one dataset has one normalisation.",
        )
