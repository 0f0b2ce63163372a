"""DICOM → dataset: the export is converted to scans without identity, and these are prepared as any others."""

import csv
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.choosing import SeriesChoice
from nnssl_plugin.intake.dicom.export import LABELS, SCANS, ConvertedExport, convert_export, local_places
from nnssl_plugin.intake.dicom.rules import Channel, parse_channels, parse_rules
from nnssl_plugin.intake.dicom.structures import WantedStructure, label_names, parse_structures
from nnssl_plugin.intake.dicom.table import TAKEN, SeriesRow, read_series
from nnssl_plugin.intake.grouping import Modalities
from nnssl_plugin.intake.labelled import LabelSummary, prepare_class_dataset
from nnssl_plugin.intake.ledger import LABEL, PROVENANCE_FILE, Origin, read_rows
from nnssl_plugin.intake.preview import Preview
from nnssl_plugin.intake.raw_dataset import FILE_ENDING, MODALITIES, dataset_folder
from nnssl_plugin.intake.unlabelled import PrepareSummary, prepare_dataset
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import read_table
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.subjects import write_subjects


@dataclass(frozen=True)
class DicomChoice:
    """What of an export is taken, and where the files lie that are not for others."""

    modality: str | None = None  # MR, CT or PET (in SUV): series of this modality alone; None: that which all have
    modalities: Sequence[str] = ()  # instead NAME=RULE each: a study is a case, its series are channels
    series: Sequence[str] = ()  # rules, see parse_rules; none: every series that is a volume
    structures: Sequence[str] = ()  # NAME=LABEL each: structures become labels; none: body masks are the labels
    resample: bool = False  # with modalities: series on another grid onto that of the first of the study
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
    ahead: Callable[[Sequence[SeriesRow]], None] | None = None,
    announce: Callable[[Preview], None] | None = None,
) -> tuple[PrepareSummary, ConvertedExport]:
    """Make or extend ``nnUNet_raw/DatasetXXX_NAME`` from an export of DICOM series.

    Cases are named by keyed hashes of study and series (:mod:`nnssl_plugin.intake.dicom.names`), or with ``modalities``
    of the study. The table of all series (``series.csv``), the converted scans and the key stay in a local folder
    beside the datasets.

    Args:
        source: folder, searched with its subfolders and zip files, or one zip file.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        choice: which series, and whether structures (RTSTRUCT, SEG) become the labels; series without any are then
            left out.
        keep: patterns of scans that are never set aside for their values; they are named as in ``series.csv``.
            Channels of a study, and images with structures, never are.
        processes: worker processes.
        ahead: is told what will become of each series before the first is converted.
        announce: is told what lies ahead before the first converted scan is read.

    Returns:
        what was prepared, and what became of every series.

    Raises:
        UserError: pydicom is not installed, no series can be taken, they are of several modalities, or the dataset
            cannot be made.
    """
    wanted, channels = parse_structures(choice.structures), parse_channels(choice.modalities)
    _check_labels(dataset_folder(dataset_id, name), wanted)
    converted = _convert(source, dataset_id, name, choice, SeriesChoice(channels=channels, wanted=wanted), processes,
                         ahead)  # fmt: skip
    places = converted.places
    cases = _cases(converted, channels, wanted, resample=choice.resample)
    summary = prepare_dataset(
        places.scans if cases is None else places.folder,
        dataset_id,
        name,
        modality=converted.modality if cases is None else None,
        modalities=cases,
        keep=keep,
        processes=processes,
        announce=announce,
    )
    _finish(summary.folder, converted)
    return replace(summary, ignored=0, unnamed=0), converted  # which would count local files


def prepare_dicom_class_dataset(
    source: str | Path,
    dataset_id: int,
    name: str,
    choice: DicomChoice,
    *,
    table: str | Path,
    targets: Sequence[str] = (),
    processes: int = 2,
    ahead: Callable[[Sequence[SeriesRow]], None] | None = None,
    announce: Callable[[Preview], None] | None = None,
) -> tuple[PrepareSummary, LabelSummary, ConvertedExport]:
    """The same with class labels: ``case`` of the table is a PatientID, a study's or series' UID, or a folder.

    Raises:
        UserError: also where a row names no series that is taken, or the table cannot be used.
    """
    rows = read_table(Path(table))
    converted = _convert(source, dataset_id, name, choice, SeriesChoice(), processes, ahead)
    own = _own_table(rows, converted, Path(source).absolute(), Path(table))
    summary, labelled = prepare_class_dataset(
        converted.places.scans,
        dataset_id,
        name,
        table=own,
        targets=targets,
        modality=converted.modality,
        processes=processes,
        announce=announce,
    )
    _finish(summary.folder, converted)
    return summary, labelled, converted


def _convert(
    source: str | Path,
    dataset_id: int,
    name: str,
    choice: DicomChoice,
    series: SeriesChoice,
    processes: int,
    ahead: Callable[[Sequence[SeriesRow]], None] | None,
) -> ConvertedExport:
    """What would be refused after hours of conversion is refused before them."""
    folder = dataset_folder(dataset_id, name)
    if choice.modality is not None and choice.modality not in MODALITIES[FILE_ENDING]:
        raise UserError(
            f"Modality {choice.modality!r} for volumes.", f"Use one of {', '.join(MODALITIES[FILE_ENDING])}."
        )
    if series.channels and (choice.modality or choice.series):
        raise UserError(
            "--modalities says which series are taken, and what they are.", "Leave out --modality and --series."
        )
    return convert_export(
        Path(source).absolute(),
        local_places(folder.name, local=choice.local, key_file=choice.key_file),
        replace(series, modality=choice.modality, rules=parse_rules(choice.series)),
        include=choice.include,
        exclude=choice.exclude,
        extend=folder.is_dir(),
        processes=processes,
        ahead=ahead,
    )


def _cases(
    converted: ConvertedExport, channels: Sequence[Channel], wanted: Sequence[WantedStructure], *, resample: bool
) -> Modalities | None:
    """The table of cases; None where every scan is one, with a body mask."""
    if not channels and not wanted:
        return None
    names = [channel.name for channel in channels] or [converted.modality]
    images: dict[str, dict[str, str]] = defaultdict(dict)
    for row in _converted_rows(converted):
        images[_case(row)][row["channel"] or names[0]] = row["scan"]
    rows = []
    for case, scans in images.items():
        cells = {name: f"{SCANS}/{scans[name]}" if name in scans else "" for name in names}
        drawn = [scans[name] for name in names if name in scans and (converted.places.labels / scans[name]).is_file()]
        if drawn or not wanted:
            rows.append({"case": case, **cells, **({LABEL: f"{LABELS}/{drawn[0]}"} if wanted else {})})
    if not rows:
        raise UserError(
            "None of the series that were converted has one of the structures.",
            f"The column structures of {converted.places.table} names those that there are.",
        )
    return Modalities(rows=tuple(rows), resample=resample, label_names=tuple(label_names(wanted))[1:])


def _converted_rows(converted: ConvertedExport) -> list[SeriesRow]:
    """The series, of earlier exports too, whose scan is there."""
    rows = (row for row in read_series(converted.places.table) if row["status"] == TAKEN)
    return [row for row in rows if (converted.places.scans / row["scan"]).is_file()]


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
    for image in (folder / "imagesTr").glob("*"):
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
    """The study where its series are channels, and otherwise the series."""
    study, _, series = row["scan"].removesuffix(FILE_ENDING).partition("/")
    return study if row["channel"] else f"{study}_{series}"


def _write_subjects(folder: Path, rows: Sequence[SeriesRow]) -> None:
    cases = {row.case for row in read_rows(folder / PROVENANCE_FILE, Origin)}
    subjects = {_case(row): row["subject"] for row in rows if row["status"] == TAKEN and _case(row) in cases}
    write_subjects(folder, subjects)


def _check_labels(folder: Path, wanted: Sequence[WantedStructure]) -> None:
    if not wanted or not read_rows(folder / PROVENANCE_FILE, Origin):
        return
    present = read_dataset_file(folder / "dataset.json").get("labels")
    if present != label_names(wanted):
        raise UserError(
            f"{folder.name} has the labels {present}, not {label_names(wanted)}.",
            "Give the same --structures as before, or a dataset of another ID with -d.",
        )
