"""A folder of scans or 2D images becomes an nnU-Net raw dataset with a body mask as its one label."""

import errno
import logging
import multiprocessing
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from tqdm import tqdm

from nnssl_plugin.intake.body_mask import body_mask
from nnssl_plugin.intake.contact_sheet import SHEET_FILE, thumbnail, volume_thumbnail, write_contact_sheet
from nnssl_plugin.intake.file_search import find_scans, matches
from nnssl_plugin.intake.ledger import (
    PROVENANCE_FILE,
    REJECTED_FILE,
    Origin,
    Rejection,
    read_rows,
    source_sha256,
    source_stamp,
    write_rows,
)
from nnssl_plugin.intake.overview import body_shares, describe_cases, far_shares
from nnssl_plugin.intake.pictures import is_picture, load_picture, picture_mask, png_bytes
from nnssl_plugin.intake.plausibility import (
    contradiction,
    is_label_like,
    named_as_another_modality,
    named_as_labels,
)
from nnssl_plugin.intake.raw_dataset import (
    FILE_ENDING,
    MODALITIES,
    NORMALISATIONS,
    PICTURE_ENDING,
    RGB,
    case_name,
    image_path,
    label_path,
    open_dataset,
    write_dataset_json,
)
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.scans import RejectedScan, Scan, UnavailableScan, ending_of, load_scan, stored_bytes
from nnssl_plugin.io.text import printable

log = logging.getLogger(__name__)

MADE_GREY = "made grey"
"""Status of a rewritten 2D image that had colour."""
_REWRITTEN = "rewritten"
_DUPLICATE = "duplicate content"
SET_ASIDE = "set aside: "
"""Begins the reason of a file that can be read and is left out; ``keep`` takes it."""
ALL = ("*",)
"""Patterns that every file matches."""
_STAGING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
THUMBNAILS = "thumbnails"
"""Folder of a dataset: a small picture per case, of which the contact sheet is made."""
LONGEST_NAME = 160
"""Characters of a case name; file systems allow 255 bytes with everything that is added to it."""


@dataclass(frozen=True)
class PrepareSummary:
    """What :func:`prepare_dataset` did."""

    folder: Path
    added: tuple[str, ...]  # cases made in this run
    known: int  # sources that earlier runs had taken, unchanged
    rejected: tuple[Rejection, ...]  # every refused file below the input folder, and every one set aside
    ignored: int  # files below the input folder that are no scans by their ending
    missing: tuple[str, ...]  # cases of the dataset whose source is gone
    dicom: int = 0  # of the ignored files, those in DICOM format
    excluded: int = 0  # scans that the patterns leave out
    unread: tuple[str, ...] = ()  # folders that were not searched, and why
    overview: tuple[str, ...] = ()  # lines about all cases of the dataset: ranges, and what is far from the others
    contact_sheet: Path | None = None  # the picture of central slices; None where no case has one

    @property
    def refused(self) -> tuple[Rejection, ...]:
        """Of the rejected files, those that cannot be used."""
        return tuple(row for row in self.rejected if not row.reason.startswith(SET_ASIDE))

    @property
    def set_aside(self) -> tuple[Rejection, ...]:
        """Of the rejected files, those that can be read and are taken where they are to be kept."""
        return tuple(row for row in self.rejected if row.reason.startswith(SET_ASIDE))


@dataclass(frozen=True)
class _Task:
    source: Path
    staging: Path  # folder for the files of this scan
    relative: Path  # of the source, below the input folder
    modality: str
    ending: str  # of the dataset's files
    keep: bool  # whether a segmentation, or an image of another modality, is taken all the same


@dataclass(frozen=True)
class _Finding:
    """What a worker found out about one file; its files, if any, lie in the task's staging folder."""

    task: _Task
    reason: str = ""  # why it is refused
    try_again: bool = False  # whether the cause lies outside of the file
    origin: Origin | None = None  # everything but the case name


def prepare_dataset(
    source: str | Path,
    dataset_id: int,
    name: str,
    *,
    modality: str | None = None,
    processes: int = 2,
    only: Collection[Path] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> PrepareSummary:
    """Make or extend ``nnUNet_raw/DatasetXXX_NAME`` from the scans below a folder.

    ``.nii.gz`` files are linked (copied where links are not possible), other containers are rewritten as ``.nii.gz``
    with the same voxel type; inputs are never changed. Bad files are listed in ``rejected.csv`` and the rest goes on;
    so are segmentations and images of another modality (:mod:`nnssl_plugin.intake.plausibility`), which are set aside.
    A second run adds what is new; a source that has changed since is taken anew under its name. A folder without
    volumes but with 2D images becomes a dataset of ``.png`` files (see :mod:`nnssl_plugin.intake.pictures`).

    Args:
        source: folder, searched with its subfolders, links followed; names that begin with a dot are left out.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        modality: ``MR`` (z-score) or ``CT`` (intensities in HU, nnU-Net's CT normalisation); for 2D images ``grey``,
            ``RGB`` or ``MR`` (all z-score). None: ``MR``, and ``grey`` for 2D images.
        processes: worker processes; 1 works in this one.
        only: which of the scans of :func:`find_scans` to take, whatever they look like; None: all.
        include: patterns of scans to take, see :func:`~nnssl_plugin.intake.file_search.matches`; none: all.
        exclude: patterns of scans to leave out.
        keep: patterns of scans that are never set aside.

    Raises:
        UserError: the folder holds no scans, or the target is not ours to write (see ``open_dataset``).
    """
    source = Path(source).absolute()
    found = find_scans(source, include=include, exclude=exclude)
    ending = PICTURE_ENDING if is_picture(found.scans[0]) else FILE_ENDING
    modality = modality or MODALITIES[ending][0]
    folder = open_dataset(dataset_id, name, modality=modality, source=source, ending=ending)
    scans = _outside(folder, found.scans) if only is None else [scan for scan in found.scans if scan in only]
    keep = keep if only is None else ALL
    ledger = _Ledger(folder, source, scans, modality=modality, ending=ending)
    staging = folder / ".incoming"
    tasks = []
    for number, scan in enumerate(scans):
        relative = scan.relative_to(source)
        kept = matches(relative.as_posix(), keep)
        if not ledger.is_settled(scan, keep=kept):
            tasks.append(_Task(scan, staging / str(number), relative, modality, ending, kept))
    try:
        for finding in tqdm(_examine_all(tasks, processes), total=len(tasks), desc="prepare", unit="scan"):
            ledger.enter(finding)
    finally:
        ledger.save()
        shutil.rmtree(staging, ignore_errors=True)
    origins = list(ledger.origins.values())
    return PrepareSummary(
        folder=folder,
        added=tuple(ledger.added),
        known=len(scans) - len(tasks) - ledger.refused_before,
        rejected=tuple(sorted(ledger.rejected.values(), key=lambda row: row.source)),
        ignored=found.others,
        missing=tuple(row.case for row in ledger.origins.values() if not os.path.exists(row.source)),
        dicom=found.dicom,
        excluded=found.excluded,
        unread=(*found.closed, *(f"{link}: it leads to a folder above the scans" for link in found.loops)),
        overview=tuple(describe_cases(origins)),
        contact_sheet=_write_sheet(folder, origins),
    )


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


class _Ledger:
    """The dataset's cases and refusals: decides what a finding becomes, and puts its files in place."""

    def __init__(self, folder: Path, root: Path, scans: Collection[Path], *, modality: str, ending: str):
        self.scans = {str(scan) for scan in scans}
        self.folder, self.root, self.modality, self.ending = folder, root, modality, ending
        self.origins = {row.source: row for row in read_rows(folder / PROVENANCE_FILE, Origin)}
        refused = read_rows(folder / REJECTED_FILE, Rejection)
        self.rejected_before = {r.source: r for r in refused if Path(r.source).is_relative_to(root)}
        self.rejected_elsewhere = [r for r in refused if not Path(r.source).is_relative_to(root)]
        self.rejected: dict[str, Rejection] = {}
        self.refused_before = 0
        self.added: list[str] = []
        self.by_voxels = {row.voxels_sha256: row for row in self.origins.values()}
        self.source_lost = any(not os.path.exists(row.source) for row in self.origins.values())
        self.names = {row.case.casefold() for row in self.origins.values()}  # some file systems ignore case

    def is_settled(self, scan: Path, *, keep: bool) -> bool:
        """Whether an earlier run has decided on this file and it has not changed since.

        A file that was set aside is looked at again where it is kept now, or nothing was taken yet: the modality may
        then be another."""
        key, stamp = str(scan), source_stamp(scan)
        refusal = self.rejected_before.get(key)
        if refusal is not None and stamp and refusal.stamp == stamp and not self._may_be_wanted_now(refusal, keep):
            self.rejected[key] = refusal
            self.refused_before += 1
            return True
        row = self.origins.get(key)
        if row is None or not stamp:
            return False
        present = all(path.exists() for path in self._files(row.case))
        if present and row.stamp == stamp:
            return True
        if present and row.sha256 == source_sha256(scan):
            self.origins[key] = replace(row, stamp=stamp)
            return True
        log.warning("%s has changed since it was taken as case %s; it is taken anew.", printable(key), row.case)
        self._withdraw(row)
        return False

    def enter(self, finding: _Finding) -> None:
        """Accept or refuse one examined file."""
        source, row = str(finding.task.source), finding.origin
        if row is None:
            self._refuse(source, finding.reason, try_again=finding.try_again)
            return
        known, name = self.by_voxels.get(row.voxels_sha256), None
        if known is not None:
            if os.path.exists(known.source):
                self._refuse(source, f"{_DUPLICATE}: the same voxels as {known.source} (case {known.case})")
                return
            name = known.case  # the same scan has moved: its case goes on from the new place
            self._withdraw(known)
        self._accept(replace(row, case=name or self._free_name(finding.task.source, row.sha256)), finding.task)

    def save(self) -> None:
        """Write the two tables and dataset.json."""
        for row in self.rejected_before.values():
            if (
                row.source in self.scans
                and row.source not in self.rejected
                and row.source not in self.origins
                and os.path.exists(row.source)
            ):
                self.rejected[row.source] = row  # an interrupted run did not come to it again
        refused = [*self.rejected_elsewhere, *self.rejected.values()]
        write_rows(self.folder / PROVENANCE_FILE, Origin, sorted(self.origins.values(), key=lambda row: row.case))
        write_rows(self.folder / REJECTED_FILE, Rejection, sorted(refused, key=lambda row: row.source))
        write_dataset_json(self.folder, modality=self.modality, cases=len(self.origins), ending=self.ending)

    def _accept(self, row: Origin, task: _Task) -> None:
        image, label = self._files(row.case)
        image.parent.mkdir(exist_ok=True)
        label.parent.mkdir(exist_ok=True)
        picture = self.folder / THUMBNAILS / f"{row.case}.png"
        picture.parent.mkdir(exist_ok=True)
        os.replace(task.staging / "thumbnail.png", picture)
        os.replace(_staged(task, "label"), label)
        if row.status in (_REWRITTEN, MADE_GREY):
            os.replace(_staged(task, "image"), image)
        else:
            row = replace(row, status=_link(task.source, task.staging / "link", image))
        self.origins[row.source] = self.by_voxels[row.voxels_sha256] = row
        self.names.add(row.case.casefold())
        self.added.append(row.case)

    def _refuse(self, source: str, reason: str, *, try_again: bool = False) -> None:
        stamp = "" if try_again else source_stamp(Path(source))  # without a stamp it is never settled
        self.rejected[source] = Rejection(source=source, reason=printable(reason), stamp=stamp)

    def _may_be_wanted_now(self, refusal: Rejection, keep: bool) -> bool:
        if refusal.reason.startswith(SET_ASIDE):
            return keep or not self.origins
        return self.source_lost and refusal.reason.startswith(_DUPLICATE)

    def _withdraw(self, row: Origin) -> None:
        del self.origins[row.source]
        self.by_voxels.pop(row.voxels_sha256, None)
        self.names.discard(row.case.casefold())
        for path in (*self._files(row.case), self.folder / THUMBNAILS / f"{row.case}.png"):
            path.unlink(missing_ok=True)

    def _files(self, case: str) -> tuple[Path, Path]:
        return image_path(self.folder, case, self.ending), label_path(self.folder, case, self.ending)

    def _free_name(self, source: Path, sha256: str) -> str:
        whole = case_name(name_without_ending(source.relative_to(self.root)))
        name = whole[:LONGEST_NAME]
        if name == whole and name.casefold() not in self.names:
            return name
        lengths = (length for length in range(8, 65) if f"{name}_{sha256[:length]}".casefold() not in self.names)
        return f"{name}_{sha256[: next(lengths)]}"


def name_without_ending(relative: Path) -> str:
    """A path with forward slashes, without the ending of a scan or 2D image."""
    return relative.as_posix()[: -len(ending_of(relative) or relative.suffix)]


def _examine_all(tasks: list[_Task], processes: int) -> Iterator[_Finding]:
    """Findings in the order of the tasks; where a worker is killed, those it may have worked on get one each."""
    examine_last = _examine
    while min(processes, len(tasks)) > 1:
        done = 0
        try:
            with _pool(min(processes, len(tasks))) as pool:
                for finding in pool.map(_examine, tasks):
                    yield finding
                    done += 1
            return
        except BrokenProcessPool:
            yield from map(_examine_apart, tasks[done : done + processes])
            tasks, examine_last = tasks[done + processes :], _examine_apart
    yield from map(examine_last, tasks)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _examine_apart(task: _Task) -> _Finding:
    """Examine one file in a process of its own, so that a file that ends its process ends nothing else."""
    try:
        with _pool(1) as pool:
            return pool.submit(_examine, task).result()
    except BrokenProcessPool:
        return _Finding(task, "the process that read it was killed, likely for want of memory", try_again=True)


def _examine(task: _Task) -> _Finding:
    """Read one file, and stage its body mask (and its rewritten image) where it is good."""
    stage = _stage_picture if task.ending == PICTURE_ENDING else _stage_volume
    try:
        _check_names(task)
        return _Finding(task, origin=stage(task))
    except RejectedScan as reason:
        return _Finding(task, reason=str(reason), try_again=isinstance(reason, UnavailableScan))
    except MemoryError:
        return _Finding(task, reason="not enough memory", try_again=True)
    except OSError as error:
        if error.errno in _STAGING_ERRORS:
            raise  # the dataset cannot be written, whatever the file
        return _Finding(task, reason=f"unreadable: {type(error).__name__}: {error}", try_again=True)
    except Exception as error:  # whatever a reader raises for one file, the others go on
        return _Finding(task, reason=f"unreadable: {type(error).__name__}: {str(error)[:160]}")


def _check_names(task: _Task) -> None:
    reason = named_as_labels(task.relative) or named_as_another_modality(task.relative, task.modality)
    if reason and not task.keep:
        raise RejectedScan(SET_ASIDE + reason)


def _check_intensities(task: _Task, array: np.ndarray) -> None:
    """Binary shapes (``noNorm``) are segmentations by their values."""
    if task.keep:
        return
    if task.modality not in NORMALISATIONS and is_label_like(array):
        raise RejectedScan(f"{SET_ASIDE}its values are those of a segmentation: few whole numbers in regions")
    reason = contradiction(array, task.modality)
    if reason:
        raise RejectedScan(SET_ASIDE + reason)


def _stage_volume(task: _Task) -> Origin:
    scan = load_scan(task.source)
    _check_intensities(task, scan.array)
    mask = body_mask(scan.array, scan.image.affine, modality=task.modality)
    _write_bytes(_staged(task, "label"), stored_bytes(_like(scan, mask)))
    _write_thumbnail(task, volume_thumbnail(scan.array, mask, scan.image.affine))
    linked = ending_of(task.source) == FILE_ENDING and scan.in_mm
    if not linked:
        _write_bytes(_staged(task, "image"), stored_bytes(scan.image))
    return Origin(
        case="",
        source=str(task.source),
        sha256=source_sha256(task.source),
        shape="x".join(str(size) for size in scan.array.shape),
        spacing_mm="x".join(f"{size:.6g}" for size in scan.spacing),
        orientation=scan.orientation,
        status="linked" if linked else _REWRITTEN,
        voxels_sha256=scan.voxels_sha256(),
        stamp=source_stamp(task.source),
        body_share=f"{mask.mean():.4f}",
    )


def _stage_picture(task: _Task) -> Origin:
    picture = load_picture(task.source, colour=task.modality == RGB)
    if picture.array.ndim == 2:
        _check_intensities(task, picture.array)
    mask = picture_mask(picture.array)
    _write_bytes(_staged(task, "label"), png_bytes(mask))
    _write_thumbnail(task, thumbnail(picture.array, mask))
    if not picture.as_stored:
        _write_bytes(_staged(task, "image"), png_bytes(picture.array))
    return Origin(
        case="",
        source=str(task.source),
        sha256=source_sha256(task.source),
        shape="x".join(str(size) for size in picture.array.shape[:2]),
        spacing_mm="",
        orientation="",
        status="linked" if picture.as_stored else MADE_GREY if picture.lost_colour else _REWRITTEN,
        voxels_sha256=picture.pixels_sha256(),
        stamp=source_stamp(task.source),
        body_share=f"{mask.mean():.4f}",
    )


def _write_thumbnail(task: _Task, image: Image.Image) -> None:
    with atomic_path(task.staging / "thumbnail.png") as temporary:
        image.save(temporary, format="PNG")


def _staged(task: _Task, name: str) -> Path:
    return task.staging / f"{name}{task.ending}"


def _like(scan: Scan, mask: np.ndarray) -> nibabel.Nifti1Image:
    """A mask with the header of its scan, so that both have the same geometry to the last bit."""
    header = scan.image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_max"], header["cal_min"] = 0, 0
    header.extensions.clear()
    return type(scan.image)(mask, scan.image.affine, header)


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _link(source: Path, staged: Path, target: Path) -> str:
    """Link (or copy) a file to its place, and say which."""
    try:
        staged.unlink(missing_ok=True)
        os.symlink(source, staged)
        os.replace(staged, target)
    except (OSError, NotImplementedError):
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return "copied"
    return "linked"
