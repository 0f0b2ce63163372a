"""An export of a hospital's archive becomes a folder of scans without identity, and a table of every series."""

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.convert import Job, Outcome, convert
from nnssl_plugin.intake.dicom.files import ExportFile, find_files, on_disk
from nnssl_plugin.intake.dicom.headers import SEGMENTATION, STRUCTURES, Instance, Unreadable, read_headers, read_whole
from nnssl_plugin.intake.dicom.names import Names, read_or_make_key
from nnssl_plugin.intake.dicom.rules import DICOM_MODALITY, Rule, attributes, why_left_out
from nnssl_plugin.intake.dicom.stacks import Stack, build_stacks
from nnssl_plugin.intake.dicom.structures import WantedStructure, names_in, referenced_series
from nnssl_plugin.intake.dicom.table import (
    COLUMNS,
    LEFT_OUT,
    REFUSED,
    SERIES_FILE,
    TAKEN,
    SeriesRow,
    count_reasons,
    merged,
    read_series,
    write_series,
)
from nnssl_plugin.intake.file_search import matches
from nnssl_plugin.io.text import printable, some

LOCAL = ".nnssl_plugin"
"""Folder in ``nnUNet_raw`` for what stays here: the key, and a folder per dataset."""
KEY_FILE = "key"


@dataclass(frozen=True)
class LocalPlaces:
    """Where the files lie that are not for others."""

    folder: Path  # of one dataset
    key: Path

    @property
    def scans(self) -> Path:
        """The converted scans: ``scans/STUDY/SERIES.nii.gz``."""
        return self.folder / "scans"

    @property
    def labels(self) -> Path:
        """Their labels, under the same names."""
        return self.folder / "labels"

    @property
    def table(self) -> Path:
        """The table of every series."""
        return self.folder / SERIES_FILE


@dataclass(frozen=True)
class ConvertedExport:
    """What became of an export."""

    places: LocalPlaces
    modality: str  # MR, CT or PET where the series taken have it, else as asked
    rows: tuple[SeriesRow, ...]
    names: Names
    unreadable: tuple[str, ...] = ()  # files that should be DICOM, and why they are not

    def with_status(self, status: str) -> list[SeriesRow]:
        """The rows of a status."""
        return [row for row in self.rows if row["status"] == status]

    @property
    def has_failures(self) -> bool:
        """Whether something that was wanted could not be read or used."""
        return bool(self.unreadable or self.with_status(REFUSED))

    @property
    def told(self) -> list[str]:
        """Notes on the series taken, each once with how many it holds for."""
        counts: dict[str, int] = defaultdict(int)
        for row in self.with_status(TAKEN):
            for note in filter(None, [*row["notes"].split("; "), row["burnt_in"]]):
                counts[note] += 1
        return [f"{count} x {note}" for note, count in sorted(counts.items())]


@dataclass(frozen=True)
class Drawing:
    """A structure set or segmentation."""

    instance: Instance
    series: frozenset[str]  # on which it was drawn; empty where it does not say
    names: tuple[str, ...]
    made: str  # date and time, to compare


def local_places(dataset: str, *, local: str | Path | None = None, key_file: str | Path | None = None) -> LocalPlaces:
    """Where the local files of a dataset lie.

    Args:
        dataset: its full name.
        local: folder of all local files; None: ``nnUNet_raw/.nnssl_plugin``.
        key_file: the key; None: ``key`` in that folder, so that a patient has one name in all datasets.

    Raises:
        UserError: no folder is given, and nnUNet_raw is not set.
    """
    if local is None and not os.environ.get("nnUNet_raw"):
        raise UserError("nnUNet_raw is not set.", 'Run: export nnUNet_raw="/path/to/nnUNet_raw" (see nnU-Net\'s docs)')
    folder = Path(local) if local is not None else Path(os.environ["nnUNet_raw"], LOCAL)
    folder = folder.absolute()
    return LocalPlaces(folder / dataset, Path(key_file).absolute() if key_file else folder / KEY_FILE)


def convert_export(
    source: Path,
    places: LocalPlaces,
    *,
    modality: str | None = None,
    rules: Sequence[Rule] = (),
    wanted: Sequence[WantedStructure] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    extend: bool = False,
    processes: int = 2,
) -> ConvertedExport:
    """Convert the series of an export that are to be taken, and write the table of all.

    A series that an earlier run has converted from the same files is not converted again.

    Args:
        source: folder, with its subfolders and zip files, or one zip file.
        places: where to write.
        modality: MR, CT or PET: take these only; None: all, which then have to be of one modality.
        rules: see :func:`~nnssl_plugin.intake.dicom.rules.parse_rules`; none: every series that is a volume.
        wanted: structures that become labels; a series on which none of them was drawn is left out.
        include: patterns of files to look at, see :func:`~nnssl_plugin.intake.file_search.matches`; none: all.
        exclude: patterns of files to leave alone.
        extend: keep what was converted from other exports.
        processes: worker processes; 1 works in this one.

    Raises:
        UserError: pydicom is not installed, no series can be taken, or they are of several modalities.
    """
    if not source.exists():
        raise UserError(f"{printable(str(source))} is not there.", "Give the folder or zip file of the export: -i DIR")
    places.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    names = read_or_make_key(places.key)
    instances, unreadable = _read_all(_files(source, include, exclude))
    drawings, undrawn = _drawings(instances)
    unreadable += undrawn
    jobs, rows = [], [_other_row(instance) for instance in _not_images(instances)]
    chosen = []
    for stack in build_stacks(instances):
        drawn = [drawing for drawing in drawings if _is_drawn_on(drawing, stack.first)]
        row = _row(stack, names, drawn)
        row["reason"] = why_left_out(stack, rules, modality) or _why_unlabelled(wanted, drawn)
        rows.append(row)
        if row["reason"]:
            row.update(status=LEFT_OUT, scan="")
        else:
            row["status"] = TAKEN
            chosen.append(row)
            jobs.append(_job(stack, row, places, drawn if wanted else (), wanted))
    if modality is None:
        _refuse_several_modalities(chosen)
    earlier = read_series(places.table) if extend else []
    try:
        _enter(tqdm(_convert_all(jobs, processes), total=len(jobs), desc="convert", unit="series"), chosen)
    finally:
        write_series(places.table, merged(earlier, rows))
    if not any(row["status"] == TAKEN for row in rows):
        raise _nothing_taken(source, rows, unreadable, places)
    _remove_others(places, merged(earlier, rows))
    return ConvertedExport(places, modality or _modality_of(chosen), tuple(rows), names, tuple(unreadable))


def _files(source: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[ExportFile]:
    for file in find_files(source):
        relative = (file.path.relative_to(source) / file.member).as_posix()
        if (not include or matches(relative, include)) and not matches(relative, exclude):
            yield file


def _read_all(files: Iterator[ExportFile]) -> tuple[list[Instance], list[str]]:
    instances, unreadable = [], []
    for header in tqdm(read_headers(files), desc="headers", unit="file"):
        if isinstance(header, Unreadable):
            unreadable.append(f"{header.file}: {header.reason}")
        elif header is not None:
            instances.append(header)
    return instances, unreadable


def _enter(outcomes: Iterator[Outcome], rows: Sequence[SeriesRow]) -> None:
    for row, outcome in zip(rows, outcomes, strict=True):
        row["notes"] = "; ".join(outcome.notes)
        if outcome.reason:
            row.update(status=REFUSED, reason=outcome.reason, scan="")


def _convert_all(jobs: list[Job], processes: int) -> Iterator[Outcome]:
    if min(processes, len(jobs)) <= 1:
        yield from map(convert, jobs)
        return
    pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(convert, jobs)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that converted a series was killed, likely for want of memory.",
            "Run the same command again with -np 1; what was converted is kept.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _remove_others(places: LocalPlaces, rows: Sequence[SeriesRow]) -> None:
    """Remove scans that other rules once took, lest they get into the dataset."""
    taken = {row["scan"] for row in rows if row["status"] == TAKEN}
    for folder in (places.scans, places.labels):
        for path in folder.glob("*/*.nii.gz"):
            if path.relative_to(folder).as_posix() not in taken:
                path.unlink()


def _drawings(instances: Sequence[Instance]) -> tuple[list[Drawing], list[str]]:
    """Every structure set and segmentation, the oldest first, and those that cannot be read."""
    found, unreadable = [], []
    for instance in instances:
        if instance.sop_class not in (SEGMENTATION, STRUCTURES):
            continue
        try:
            found.append(_drawing(instance))
        except Exception as error:  # whatever pydicom raises for one file, the others go on
            unreadable.append(f"{instance.file}: damaged: {type(error).__name__}: {str(error)[:120]}")
    return sorted(found, key=lambda drawing: (drawing.made, drawing.instance.uid)), unreadable


def _drawing(instance: Instance) -> Drawing:
    with on_disk([instance.file]) as (path,):
        dataset = read_whole(path)
    dates = (dataset.get(name) for name in ("StructureSetDate", "StructureSetTime", "ContentDate", "ContentTime"))
    made = " ".join(str(date or "") for date in dates)
    return Drawing(instance, frozenset(referenced_series(dataset)), tuple(names_in(dataset)), made)


def _is_drawn_on(drawing: Drawing, image: Instance) -> bool:
    """By the series that it names, and where it names none by study and frame of reference."""
    if drawing.series:
        return image.series in drawing.series
    same_frame = image.frame_of_reference and image.frame_of_reference == drawing.instance.frame_of_reference
    return bool(same_frame) and image.study == drawing.instance.study


def _why_unlabelled(wanted: Sequence[WantedStructure], drawn: Sequence[Drawing]) -> str:
    return "no structures were drawn on it" if wanted and not drawn else ""


def _job(
    stack: Stack, row: SeriesRow, places: LocalPlaces, drawn: Sequence[Drawing], wanted: Sequence[WantedStructure]
) -> Job:
    return Job(
        stack=stack,
        image=places.scans / row["scan"],
        state=places.folder / "state" / (row["scan"].replace("/", "_") + ".json"),
        labels=places.labels / row["scan"] if wanted else None,
        drawings=tuple(drawing.instance.file for drawing in drawn),
        wanted=tuple(wanted),
    )


def _row(stack: Stack, names: Names, drawn: Sequence[Drawing]) -> SeriesRow:
    first = stack.first
    study = names.of("study", first.study)
    series = names.of("series", f"{first.series} {stack.part}".strip())
    return dict.fromkeys(COLUMNS, "") | {
        **{name: text for name, text in attributes(stack).items() if name in COLUMNS},
        "scan": f"{study}/{series}.nii.gz",
        "subject": names.of("patient", first.patient or first.study),
        "slices": str(len(stack.frames)),
        "part": stack.part,
        "burnt_in": _burnt_in(stack),
        "structures": "; ".join(name for drawing in drawn for name in drawing.names),
        "files": str(stack.files),
        "folder": _folder(stack.frames[0].file),
        "StudyInstanceUID": first.study,
        "SeriesInstanceUID": first.series,
    }


def _burnt_in(stack: Stack) -> str:
    if stack.first.shown.get("BurnedInAnnotation", "").upper() == "YES":
        return "burnt-in annotation: its texts may name the patient"
    return "texts outside of the ultrasound regions may name the patient" if stack.ultrasound_regions else ""


def _not_images(instances: Sequence[Instance]) -> list[Instance]:
    """One instance for each series of objects that are no images."""
    return list({(i.study, i.series): i for i in instances if not i.is_image}.values())


def _other_row(instance: Instance) -> SeriesRow:
    kind = instance.shown.get("Modality") or "object"
    return dict.fromkeys(COLUMNS, "") | instance.shown | {
        "status": LEFT_OUT,
        "reason": f"{kind} and no image",
        "files": "1",
        "folder": _folder(instance.file),
        "StudyInstanceUID": instance.study,
        "SeriesInstanceUID": instance.series,
    }  # fmt: skip


def _folder(file: ExportFile) -> str:
    return str(file.path if file.member else file.path.parent)


def _modality_of(rows: Sequence[SeriesRow]) -> str:
    """``--modality`` of the series, MR where it has no name of its own."""
    found = {row["Modality"] for row in rows}
    return next((ours for ours, dicom in DICOM_MODALITY.items() if {dicom} == found), "MR")


def _refuse_several_modalities(chosen: Sequence[SeriesRow]) -> None:
    found = sorted({row["Modality"] for row in chosen})
    if len(found) > 1:
        known = [ours for ours, dicom in DICOM_MODALITY.items() if dicom in found]
        raise UserError(
            f"The export holds series of {', '.join(found)}, and a dataset has one modality.",
            f"Say which: --modality {known[0] if known else 'noNorm --series Modality=' + found[0]}",
        )


def _nothing_taken(
    source: Path, rows: Sequence[SeriesRow], unreadable: Sequence[str], places: LocalPlaces
) -> UserError:
    what = [*count_reasons(rows), *([f"{len(unreadable)} damaged DICOM files"] if unreadable else [])]
    return UserError(
        f"No DICOM series below {printable(str(source))} can be taken: {printable(some(what) or 'there is none')}.",
        f"{places.table} says why for each; choose with --modality and --series.",
    )
