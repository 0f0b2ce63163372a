"""An export of a hospital's archive becomes a folder of scans without identity, and a table of every series."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.choosing import (
    Candidate,
    SeriesChoice,
    choose_series,
    find_drawings,
    modality_of,
    other_rows,
    refuse_several_modalities,
)
from nnssl_plugin.intake.dicom.convert import Job, Outcome, convert
from nnssl_plugin.intake.dicom.files import ExportFile, find_files
from nnssl_plugin.intake.dicom.headers import Instance, Unreadable, read_headers
from nnssl_plugin.intake.dicom.names import Names, read_or_make_key
from nnssl_plugin.intake.dicom.structures import WantedStructure
from nnssl_plugin.intake.dicom.table import (
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
from nnssl_plugin.intake.workers import in_processes
from nnssl_plugin.io.text import printable, some

LOCAL = ".nnssl_plugin"
"""Folder in ``nnUNet_raw`` for what stays here: the key, and a folder per dataset."""
KEY_FILE = "key"
SCANS, LABELS = "scans", "labels"


@dataclass(frozen=True)
class LocalPlaces:
    """Where the files lie that are not for others."""

    folder: Path  # of one dataset
    key: Path

    @property
    def scans(self) -> Path:
        """The converted scans: ``scans/STUDY/SERIES.nii.gz``."""
        return self.folder / SCANS

    @property
    def labels(self) -> Path:
        """Their labels, under the same names."""
        return self.folder / LABELS

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
    choice: SeriesChoice,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    extend: bool = False,
    processes: int = 2,
    ahead: Callable[[Sequence[SeriesRow]], None] | None = None,
) -> ConvertedExport:
    """Convert the series of an export that are to be taken, and write the table of all.

    A series that an earlier run has converted from the same files is not converted again.

    Args:
        source: folder, with its subfolders and zip files, or one zip file.
        places: where to write.
        choice: which series; without a modality or channels they have to be of one modality.
        include: patterns of files to look at, see :func:`~nnssl_plugin.intake.file_search.matches`; none: all.
        exclude: patterns of files to leave alone.
        extend: keep what was converted from other exports.
        processes: worker processes; 1 works in this one.
        ahead: is told what will become of each series before the first is converted.

    Raises:
        UserError: pydicom is not installed, no series can be taken, or they are of several modalities.
    """
    if not source.exists():
        raise UserError(f"{printable(str(source))} is not there.", "Give the folder or zip file of the export: -i DIR")
    places.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    names = read_or_make_key(places.key)
    instances, unreadable = _read_all(_files(source, include, exclude))
    drawings, undrawn = find_drawings(instances)
    unreadable += undrawn
    candidates = choose_series(instances, drawings, names, choice)
    chosen = [candidate for candidate in candidates if candidate.is_taken]
    rows = [*other_rows(instances), *(candidate.row for candidate in candidates)]
    earlier = read_series(places.table) if extend else []
    try:
        if choice.modality is None and not choice.channels:
            refuse_several_modalities(rows)
        if ahead is not None:
            ahead(rows)
        _convert_all(chosen, places, choice.wanted, processes)
    finally:
        write_series(places.table, merged(earlier, rows))
    if not any(row["status"] == TAKEN for row in rows):
        raise _nothing_taken(source, rows, unreadable, places)
    _remove_others(places, merged(earlier, rows))
    modality = choice.modality or modality_of([candidate.row for candidate in chosen])
    return ConvertedExport(places, modality, tuple(rows), names, tuple(unreadable))


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


def _convert_all(
    chosen: Sequence[Candidate], places: LocalPlaces, wanted: Sequence[WantedStructure], processes: int
) -> None:
    """Convert what was chosen, and enter into the rows what became of it."""
    jobs = [_job(candidate, places, wanted) for candidate in chosen]
    outcomes = in_processes(convert, jobs, processes, killed=_killed)
    progress = tqdm(outcomes, total=len(jobs), desc="convert", unit="series")
    for candidate, outcome in zip(chosen, progress, strict=True):
        candidate.row["notes"] = "; ".join(outcome.notes)
        if outcome.reason:
            candidate.row.update(status=REFUSED, reason=outcome.reason, scan="")


def _killed(job: Job) -> Outcome:
    return Outcome("the process that read it was killed: its pixels are damaged, or memory lacks", try_again=True)


def _remove_others(places: LocalPlaces, rows: Sequence[SeriesRow]) -> None:
    """Remove scans that other rules once took, lest they get into the dataset."""
    taken = {row["scan"] for row in rows if row["status"] == TAKEN}
    for folder in (places.scans, places.labels):
        for path in folder.glob("*/*.nii.gz"):
            if path.relative_to(folder).as_posix() not in taken:
                path.unlink()


def _job(candidate: Candidate, places: LocalPlaces, wanted: Sequence[WantedStructure]) -> Job:
    scan, is_labelled = candidate.row["scan"], bool(wanted and candidate.drawn)
    return Job(
        stack=candidate.stack,
        image=places.scans / scan,
        state=places.folder / "state" / (scan.replace("/", "_") + ".json"),
        labels=places.labels / scan if is_labelled else None,
        drawings=tuple(drawing.instance.file for drawing in candidate.drawn) if is_labelled else (),
        wanted=tuple(wanted) if is_labelled else (),
    )


def _nothing_taken(
    source: Path, rows: Sequence[SeriesRow], unreadable: Sequence[str], places: LocalPlaces
) -> UserError:
    what = [*count_reasons(rows), *([f"{len(unreadable)} damaged DICOM files"] if unreadable else [])]
    return UserError(
        f"No DICOM series below {printable(str(source))} can be taken: {printable(some(what) or 'there is none')}.",
        f"{places.table} says why for each; choose with --modality and --series.",
    )
