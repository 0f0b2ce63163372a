"""DICOM → dataset: the export is converted to scans without identity, and these are prepared as any others."""

import csv
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.contact_sheet import SHEET_FILE, volume_thumbnail, write_contact_sheet
from nnssl_plugin.intake.dicom.export import ConvertedExport, convert_export, local_places
from nnssl_plugin.intake.dicom.rules import parse_rules
from nnssl_plugin.intake.dicom.structures import WantedStructure, label_names, parse_structures
from nnssl_plugin.intake.dicom.table import TAKEN, SeriesRow, read_series
from nnssl_plugin.intake.labelled import LabelSummary, prepare_class_dataset
from nnssl_plugin.intake.ledger import PROVENANCE_FILE, Origin, read_rows, source_sha256, source_stamp, write_rows
from nnssl_plugin.intake.overview import describe_cases
from nnssl_plugin.intake.raw_dataset import (
    FILE_ENDING,
    MODALITIES,
    DatasetKind,
    image_path,
    label_path,
    open_dataset,
    write_dataset_json,
)
from nnssl_plugin.intake.unlabelled import THUMBNAILS, PrepareSummary, prepare_dataset
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.io.scans import load_scan, read_volume
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import read_table
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.subjects import write_subjects


@dataclass(frozen=True)
class DicomChoice:
    """What of an export is taken, and where the files lie that are not for others."""

    modality: str | None = None  # MR, CT or PET (in SUV): series of this modality alone; None: that which all have
    series: Sequence[str] = ()  # rules, see parse_rules; none: every series that is a volume
    structures: Sequence[str] = ()  # NAME=LABEL each: structures become labels; none: body masks are the labels
    include: Sequence[str] = ()  # patterns of files to look at; none: all
    exclude: Sequence[str] = ()  # patterns of files to leave alone
    key_file: str | Path | None = None  # of the hashes that name cases; None: the one in the local folder
    local: str | Path | None = None  # the local folder; None: nnUNet_raw/.nnssl_plugin


def prepare_dicom_dataset(
    source: str | Path,
    dataset_id: int,
    name: str,
    choice: DicomChoice,
    *,
    keep: Sequence[str] = (),
    processes: int = 2,
) -> tuple[PrepareSummary, ConvertedExport]:
    """Make or extend ``nnUNet_raw/DatasetXXX_NAME`` from an export of DICOM series.

    Cases are named by keyed hashes of study and series (:mod:`nnssl_plugin.intake.dicom.names`). The table of all
    series (``series.csv``), the converted scans and the key stay in a local folder beside the datasets.

    Args:
        source: folder, searched with its subfolders and zip files, or one zip file.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        choice: which series, and whether structures (RTSTRUCT, SEG) become the labels; series without any are then
            left out.
        keep: patterns of scans that are never set aside for their values; they are named as in ``series.csv``.
        processes: worker processes.

    Returns:
        what was prepared, and what became of every series.

    Raises:
        UserError: pydicom is not installed, no series can be taken, they are of several modalities, or the dataset
            cannot be made.
    """
    wanted = parse_structures(choice.structures)
    converted = _convert(source, dataset_id, name, choice, wanted, processes)
    if wanted:
        summary = _write_labelled(converted, dataset_id, name, wanted)
    else:
        summary = prepare_dataset(
            converted.places.scans, dataset_id, name, modality=converted.modality, keep=keep, processes=processes
        )
    _finish(summary.folder, converted)
    return summary, converted


def prepare_dicom_class_dataset(
    source: str | Path,
    dataset_id: int,
    name: str,
    choice: DicomChoice,
    *,
    table: str | Path,
    targets: Sequence[str] = (),
    processes: int = 2,
) -> tuple[PrepareSummary, LabelSummary, ConvertedExport]:
    """The same with class labels: ``case`` of the table is a PatientID, a study's or series' UID, or a folder.

    Raises:
        UserError: also where a row names no series that is taken, or the table cannot be used.
    """
    rows = read_table(Path(table))
    converted = _convert(source, dataset_id, name, choice, (), processes)
    own = _own_table(rows, converted, Path(source).absolute(), Path(table))
    summary, labelled = prepare_class_dataset(
        converted.places.scans,
        dataset_id,
        name,
        table=own,
        targets=targets,
        modality=converted.modality,
        processes=processes,
    )
    _finish(summary.folder, converted)
    return summary, labelled, converted


def _convert(
    source: str | Path,
    dataset_id: int,
    name: str,
    choice: DicomChoice,
    wanted: Sequence[WantedStructure],
    processes: int,
) -> ConvertedExport:
    rules = parse_rules(choice.series)
    _check_target(dataset_id, name, choice.modality)
    dataset = f"Dataset{dataset_id:03d}_{name}"
    return convert_export(
        Path(source).absolute(),
        local_places(dataset, local=choice.local, key_file=choice.key_file),
        modality=choice.modality,
        rules=rules,
        wanted=wanted,
        include=choice.include,
        exclude=choice.exclude,
        extend=Path(os.environ.get("nnUNet_raw", ""), dataset).is_dir(),
        processes=processes,
    )


def _check_target(dataset_id: int, name: str, modality: str | None) -> None:
    """Before hours of conversion, what would be refused after them."""
    if not 1 <= dataset_id <= 999 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(
            f"Dataset ID {dataset_id} with the name {name!r}.",
            "Give 1 to 999, and letters, digits, - and _: -d 501 -n X",
        )
    if modality is not None and modality not in MODALITIES[FILE_ENDING]:
        raise UserError(f"Modality {modality!r} for volumes.", f"Use one of {', '.join(MODALITIES[FILE_ENDING])}.")


def _own_table(rows: Sequence[dict[str, str]], converted: ConvertedExport, source: Path, where: Path) -> Path:
    """The user's table with our names of scans and subjects, as a local file."""
    taken, own, unknown = converted.with_status(TAKEN), [], []
    for row in rows:
        case = row["case"]
        keys = {case, converted.names.of("patient", case)}
        folder = Path(os.path.normpath(source / case))
        named = [
            scan
            for scan in taken
            if keys & {scan["StudyInstanceUID"], scan["SeriesInstanceUID"], scan["subject"]}
            or Path(scan["folder"]).is_relative_to(folder)
        ]
        own += [{**row, "case": scan["scan"], "subject": scan["subject"]} for scan in named]
        unknown += [] if named else [case]
    if unknown:
        raise UserError(
            f"{where} names what no series that is taken belongs to: {some(unknown)}.",
            f"Write PatientID, StudyInstanceUID or a folder below {source}, or delete the rows.",
        )
    path = converted.places.folder / "class_labels.csv"
    columns = list(dict.fromkeys(["case", "subject", *rows[0]]))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns)
        writer.writeheader()
        writer.writerows(own)
    return path


def _finish(folder: Path, converted: ConvertedExport) -> None:
    """What every dataset from an export gets: images of its own, and a table of subjects."""
    _own_images(folder, converted.places.scans)
    _write_subjects(folder, read_series(converted.places.table))


def _own_images(folder: Path, scans: Path) -> None:
    """Images that are links into the local folder become files of the dataset, which can then be copied and shared."""
    for image in (folder / "imagesTr").iterdir():
        if image.is_symlink() and image.resolve().is_relative_to(scans.resolve()):
            _place(image.resolve(), image)


def _place(source: Path, target: Path) -> None:
    """A second name of a file where the file system has these, otherwise a copy."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _case(row: SeriesRow) -> str:
    return row["scan"].removesuffix(".nii.gz").replace("/", "_")


def _write_subjects(folder: Path, rows: Sequence[SeriesRow]) -> None:
    cases = {row.case for row in read_rows(folder / PROVENANCE_FILE, Origin)}
    subjects = {_case(row): row["subject"] for row in rows if row["status"] == TAKEN and _case(row) in cases}
    write_subjects(folder, subjects)


def _write_labelled(
    converted: ConvertedExport, dataset_id: int, name: str, wanted: Sequence[WantedStructure]
) -> PrepareSummary:
    """The dataset of the scans with structures, whose labels these are."""
    places = converted.places
    kind = DatasetKind((converted.modality,), labelled=True)
    folder = open_dataset(dataset_id, name, kind, source=places.scans)
    before = {row.case: row for row in read_rows(folder / PROVENANCE_FILE, Origin)}
    _check_labels(folder, wanted, before)
    origins, added = dict(before), []
    for row in (row for row in read_series(places.table) if row["status"] == TAKEN):
        case, image, labels = _case(row), places.scans / row["scan"], places.labels / row["scan"]
        stamp = f"{source_stamp(image)};{source_stamp(labels)}"
        files = [image_path(folder, case), label_path(folder, case)]
        if case in before and before[case].stamp == stamp and all(file.is_file() for file in files):
            continue
        for made, target in zip((image, labels), files, strict=True):
            _place(made, target)
        origins[case] = _origin(folder, case, image, labels, stamp)
        added.append(case)
    ordered = sorted(origins.values(), key=lambda row: row.case)
    write_rows(folder / PROVENANCE_FILE, Origin, ordered)
    write_dataset_json(folder, kind, cases=len(ordered))
    write_json(folder / "dataset.json", {**read_dataset_file(folder / "dataset.json"), "labels": label_names(wanted)})
    pictures = [(row.case, folder / THUMBNAILS / f"{row.case}.png") for row in ordered]
    write_contact_sheet(folder / SHEET_FILE, pictures)
    return PrepareSummary(
        folder=folder,
        added=tuple(added),
        known=len(ordered) - len(added),
        rejected=(),
        ignored=0,
        missing=(),
        overview=tuple(describe_cases(ordered)),
        contact_sheet=folder / SHEET_FILE,
    )


def _origin(folder: Path, case: str, image: Path, labels: Path, stamp: str) -> Origin:
    """The row of a case, whose thumbnail is drawn on the way."""
    scan, (mask, _) = load_scan(image), read_volume(labels)
    with atomic_path(folder / THUMBNAILS / f"{case}.png") as temporary:
        volume_thumbnail(scan.array, mask > 0, scan.image.affine).save(temporary, format="PNG")
    return Origin(
        case=case,
        source=str(image),
        sha256=source_sha256(image),
        shape="x".join(str(size) for size in scan.array.shape),
        spacing_mm="x".join(f"{size:.6g}" for size in scan.spacing),
        orientation=scan.orientation,
        status="linked",
        voxels_sha256=scan.voxels_sha256(),
        stamp=stamp,
    )


def _check_labels(folder: Path, wanted: Sequence[WantedStructure], before: dict[str, Origin]) -> None:
    present = read_dataset_file(folder / "dataset.json").get("labels")
    if before and present != label_names(wanted):
        raise UserError(
            f"{folder.name} has the labels {present}, not {label_names(wanted)}.",
            "Give the same --structures as before, or a dataset of another ID with -d.",
        )
