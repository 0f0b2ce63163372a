"""A folder of scans or 2D images becomes an nnU-Net raw dataset, with body masks as its labels or the user's own."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.case_ledger import THUMBNAILS, CaseLedger
from nnssl_plugin.intake.contact_sheet import SHEET_FILE, write_contact_sheet
from nnssl_plugin.intake.examination import MADE_GREY, SET_ASIDE
from nnssl_plugin.intake.file_search import FoundFiles, find_scans
from nnssl_plugin.intake.grouping import Grouped, Modalities, group_scans, single_groups
from nnssl_plugin.intake.histograms import draw_histograms
from nnssl_plugin.intake.journal import INCOMING, Journal, check_complete
from nnssl_plugin.intake.layouts import Layout, find_layout, group_layout
from nnssl_plugin.intake.ledger import PROVENANCE_FILE, Origin, Rejection, read_rows
from nnssl_plugin.intake.overview import body_shares, describe_cases, far_shares
from nnssl_plugin.intake.pictures import is_picture
from nnssl_plugin.intake.preview import Preview, preview
from nnssl_plugin.intake.raw_dataset import (
    FILE_ENDING,
    MODALITIES,
    PICTURE_ENDING,
    DatasetKind,
    open_dataset,
)
from nnssl_plugin.intake.tasks import Group, Task
from nnssl_plugin.io.files import remove_temporary_files
from nnssl_plugin.io.lock import locked

ALL = ("*",)
"""Patterns that every file matches."""
LOCK_FILE = ".prepare.lock"


@dataclass(frozen=True)
class PrepareSummary:
    """What :func:`prepare_dataset` did."""

    folder: Path
    added: tuple[str, ...]  # cases made in this run
    known: int  # cases that earlier runs had made, unchanged
    rejected: tuple[Rejection, ...]  # every refused file below the input folder, and every one set aside
    ignored: int  # files below the input folder that are no scans by their ending
    missing: tuple[str, ...]  # cases of the dataset whose source is gone
    dicom: int = 0  # of the ignored files, those in DICOM format
    excluded: int = 0  # scans that the patterns leave out
    unnamed: int = 0  # scans that no modality names
    unread: tuple[str, ...] = ()  # folders that were not searched, and why
    overview: tuple[str, ...] = ()  # lines about all cases of the dataset: ranges, and what is far from the others
    contact_sheet: Path | None = None  # the picture of central slices; None where no case has one
    histograms: Path | None = None  # the picture of spacings, sizes, intensities and masks; None where there is no case
    absent: tuple[tuple[str, int], ...] = ()  # of several modalities, each with the number of cases that lack it

    @property
    def refused(self) -> tuple[Rejection, ...]:
        """Of the rejected files, those that cannot be used."""
        return tuple(row for row in self.rejected if not row.reason.startswith(SET_ASIDE))

    @property
    def set_aside(self) -> tuple[Rejection, ...]:
        """Of the rejected files, those that can be read and are taken where they are to be kept."""
        return tuple(row for row in self.rejected if row.reason.startswith(SET_ASIDE))


@dataclass(frozen=True)
class Part:
    """One of several runs that share the work, or the merge of what they did."""

    number: int | None  # 0 to count - 1; None: merge
    count: int

    def __post_init__(self):
        if self.count < 1 or not (self.number is None or 0 <= self.number < self.count):
            raise UserError(
                f"Part {self.number} of {self.count}.",
                "Count from 0: -num_parts 2 -part_id 0, then 1, then --merge",
            )


def prepare_dataset(
    source: str | Path,
    dataset_id: int,
    name: str,
    *,
    modality: str | None = None,
    modalities: Modalities | None = None,
    processes: int = 2,
    only: Collection[Path] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    part: Part | None = None,
    announce: Callable[[Preview], None] | None = None,
) -> PrepareSummary:
    """Make or extend ``nnUNet_raw/DatasetXXX_NAME`` from the scans below a folder.

    ``.nii.gz`` files are linked (copied where links are not possible), other containers are rewritten as ``.nii.gz``
    with the same voxel type; inputs are never changed. Bad files are listed in ``rejected.csv`` and the rest goes on;
    so are segmentations and images of another modality (:mod:`nnssl_plugin.intake.plausibility`), which are set aside.
    A second run adds what is new; a source that has changed since is taken anew under its name. A run that was killed
    is gone on with. A folder without volumes but with 2D images becomes a dataset of ``.png`` files (see
    :mod:`nnssl_plugin.intake.pictures`).

    Args:
        source: folder, searched with its subfolders, links followed; names that begin with a dot are left out.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        modality: ``MR`` (z-score) or ``CT`` (intensities in HU, nnU-Net's CT normalisation); for 2D images ``grey``,
            ``RGB`` or ``MR`` (all z-score). None: ``MR``, and ``grey`` for 2D images.
        modalities: instead, what the channels of a case with several images are, and perhaps its segmentation
            (:mod:`nnssl_plugin.intake.grouping`; without a pattern: of a folder that nnU-Net or the Decathlon laid
            out, :mod:`nnssl_plugin.intake.layouts`); channels that a case lacks are zeros, as ``modalities.json`` says.
        processes: worker processes; 1 works in this one.
        only: which of the scans of :func:`find_scans` to take, whatever they look like; None: all.
        include: patterns of scans to take, see :func:`~nnssl_plugin.intake.file_search.matches`; none: all.
        exclude: patterns of scans to leave out.
        keep: patterns of scans that are never set aside.
        part: which share of the cases to examine (nothing is put in place before the merge); None: all.
        announce: is told what lies ahead before the first scan is read.

    Raises:
        UserError: the folder holds no scans, the target is not ours to write (see ``open_dataset``), another run works
            in it, or a part is not complete where they are merged.
    """
    source = Path(source).absolute()
    found = find_scans(source, include=include, exclude=exclude)
    ending = PICTURE_ENDING if is_picture(found.scans[0]) else FILE_ENDING
    layout = find_layout(source) if only is None and ending == FILE_ENDING else None
    kind = _kind(ending, modality, modalities, layout)
    folder = open_dataset(dataset_id, name, kind, source=source)
    scans = _outside(folder, found.scans) if only is None else [scan for scan in found.scans if scan in only]
    keep = keep if only is None else ALL
    if modalities is not None and modalities.names:
        grouped = group_scans(scans, source, modalities, keep=keep)
    elif layout is not None:
        grouped = group_layout(scans, source, layout, labelled=kind.labelled, keep=keep)
    else:
        grouped = Grouped(single_groups(scans, source, keep=keep))
    journal = Journal(folder / INCOMING, _journal_name(part))
    resample = modalities is not None and modalities.resample
    with _alone(folder, part):
        ledger = CaseLedger(folder, source, kind)
        todo = [group for group in grouped.groups if not ledger.is_settled(group, resample=resample)]
        tasks = [_task(group, folder / INCOMING, kind, resample) for group in todo]
        if announce is not None:
            known = len(grouped.groups) - len(todo)
            announce(preview(tasks, known=known, folder=folder, processes=processes))
        if part is not None and part.number is not None:
            _examine_part(journal, tasks, part, processes)
            return _summary(ledger, grouped, todo, found)
        if part is not None:
            check_complete(journal, tasks, part.count)
        _enter_all(ledger, journal, tasks, grouped, processes)
        return _summary(ledger, grouped, todo, found, pictures=_draw(folder, ledger.origins))


def _kind(ending: str, modality: str | None, modalities: Modalities | None, layout: Layout | None) -> DatasetKind:
    if modalities is not None and modalities.names:
        if modality is not None:
            raise UserError(
                f"--modality {modality} and --modalities.", "The names of --modalities say it: CT=PATTERN is in HU."
            )
        if ending == PICTURE_ENDING:
            raise UserError("--modalities takes volumes; the folder holds 2D images.", "Leave the option out.")
        return DatasetKind(modalities.names, ending, modalities.has_labels, modalities.label_names)
    if layout is not None:
        return layout.kind(modality, labelled=modalities is not None and modalities.has_labels)
    if modalities is not None:
        raise UserError(
            "Which files belong together is not known: the folder has no imagesTr beside a dataset.json.",
            'Say it: --modalities "MR=images/*" --labels "labels/*"',
        )
    return DatasetKind.of(modality or MODALITIES[ending][0], ending)


def _journal_name(part: Part | None) -> str:
    whole = part is None or part.number is None
    return "findings.jsonl" if whole else f"findings_{part.number}_of_{part.count}.jsonl"  # type: ignore[union-attr]


def _alone(folder: Path, part: Part | None):
    """Parts work beside one another, and write into the folder of staged files alone."""
    return locked(folder / LOCK_FILE) if part is None or part.number is None else nullcontext()


def _task(group: Group, incoming: Path, kind: DatasetKind, resample: bool) -> Task:
    task = Task(group, incoming, kind.files, kind.ending, resample)
    return Task(group, incoming / task.fingerprint(), kind.files, kind.ending, resample)


def _examine_part(journal: Journal, tasks: Sequence[Task], part: Part, processes: int) -> None:
    own = tasks[part.number :: part.count]
    for _ in tqdm(journal.examine(own, processes), total=len(own), desc=f"part {part.number}", unit="case"):
        pass


def _enter_all(ledger: CaseLedger, journal: Journal, tasks: Sequence[Task], grouped: Grouped, processes: int) -> None:
    for name in ("", "imagesTr", "labelsTr", THUMBNAILS):
        remove_temporary_files(ledger.folder / name)
    for refusal in grouped.refusals:
        ledger.refuse(refusal)
    for task in tasks:
        ledger.make_way(task.group)
    progress = tqdm(journal.examine(tasks, processes), total=len(tasks), desc="prepare", unit="scan")
    try:
        for task, finding in zip(tasks, progress, strict=True):
            ledger.enter(task, finding, journal.place)
    finally:
        for case in set(journal.placed) - set(ledger.cases):
            ledger.remove_files(case)  # a run was cut off there, and nothing replaced it
        ledger.save(grouped.groups)
        journal.remove()


def _summary(
    ledger: CaseLedger,
    grouped: Grouped,
    todo: Collection[Group],
    found: FoundFiles,
    pictures: tuple[Path | None, Path | None] = (None, None),
) -> PrepareSummary:
    taken = sum(any(str(s.path) in ledger.case_of for s in group.images) for group in grouped.groups)
    fresh = sum(any(str(s.path) in ledger.case_of for s in group.images) for group in todo)
    cases = ledger.cases.items()
    missing = (case for case, rows in cases if not all(os.path.exists(row.source) for row in rows))
    return PrepareSummary(
        folder=ledger.folder,
        added=tuple(ledger.added),
        known=taken - fresh,
        rejected=tuple(sorted(ledger.rejected.values(), key=lambda row: row.source)),
        ignored=found.others,
        missing=tuple(missing),
        dicom=found.dicom,
        excluded=found.excluded,
        unnamed=grouped.left_out,
        unread=(*found.closed, *(f"{link}: it leads to a folder above the scans" for link in found.loops)),
        overview=tuple(describe_cases(ledger.origins)),
        contact_sheet=pictures[0],
        histograms=pictures[1],
        absent=ledger.absent(),
    )


def _draw(folder: Path, origins: Sequence[Origin]) -> tuple[Path | None, Path | None]:
    """The contact sheet and the histograms."""
    return _write_sheet(folder, origins), draw_histograms(folder, origins)


def _write_sheet(folder: Path, origins: Sequence[Origin]) -> Path | None:
    """The contact sheet: first the cases whose mask is far from the others', then the rest by name."""
    far = far_shares(body_shares(origins))
    cases = [*far, *sorted({row.case for row in origins} - set(far))]
    pictures = [(case, file) for case in cases if (file := folder / THUMBNAILS / f"{case}.png").is_file()]
    if not pictures:
        return None
    write_contact_sheet(folder / SHEET_FILE, pictures)
    return folder / SHEET_FILE


def _outside(folder: Path, scans: Sequence[Path]) -> list[Path]:
    """The scans that are not files of the dataset itself, to which a link may lead."""
    is_inside = cache(lambda parent: parent.resolve().is_relative_to(folder.resolve()))
    return [scan for scan in scans if not is_inside(scan.parent)]


def made_grey(summary: PrepareSummary) -> int:
    """How many of the cases made in this run are colour images that were stored as grey."""
    origins = read_rows(summary.folder / PROVENANCE_FILE, Origin)
    return sum(row.status == MADE_GREY and row.case in summary.added for row in origins)
