"""A folder of unlabelled scans becomes an nnU-Net raw dataset with a body mask as its one label."""

import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.files import atomic_path
from nnssl_plugin.intake.bodymask import body_mask
from nnssl_plugin.intake.provenance import (
    PROVENANCE_FILE,
    REJECTED_FILE,
    Origin,
    Rejection,
    read_rows,
    source_sha256,
    source_stamp,
    write_rows,
)
from nnssl_plugin.intake.raw_dataset import (
    FILE_ENDING,
    case_name,
    image_path,
    label_path,
    open_dataset,
    write_dataset_json,
)
from nnssl_plugin.intake.scans import ENDINGS, RejectedScan, Scan, ending_of, load_scan, stored_bytes

log = logging.getLogger(__name__)

_DUPLICATE = "duplicate content"


@dataclass(frozen=True)
class PrepareSummary:
    """What :func:`prepare_dataset` did."""

    folder: Path
    added: tuple[str, ...]  # cases made in this run
    known: int  # sources that earlier runs had taken, unchanged
    rejected: tuple[Rejection, ...]  # every refused file below the input folder
    ignored: int  # files below the input folder that are no scans by their ending
    missing: tuple[str, ...]  # cases of the dataset whose source is gone


@dataclass(frozen=True)
class _Task:
    source: Path
    staging: Path  # folder for the files of this scan
    modality: str


@dataclass(frozen=True)
class _Finding:
    """What a worker found out about one file; its files, if any, lie in the task's staging folder."""

    task: _Task
    reason: str = ""  # why it is refused
    origin: Origin | None = None  # everything but the case name


def prepare_dataset(
    source: str | Path, dataset_id: int, name: str, *, modality: str = "MR", processes: int = 2
) -> PrepareSummary:
    """Make or extend ``nnUNet_raw/DatasetXXX_NAME`` from the scans below a folder.

    ``.nii.gz`` files are linked (copied where links are not possible), other containers are rewritten as ``.nii.gz``
    with the same voxel type; inputs are never changed. Bad files are listed in ``rejected.csv`` and the rest goes on.
    A second run adds what is new; a source that has changed since is taken anew under its name.

    Args:
        source: folder, searched with its subfolders; names that begin with a dot are left out.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        modality: ``MR`` (z-score) or ``CT`` (intensities in HU, nnU-Net's CT normalisation).
        processes: worker processes; 1 works in this one.

    Raises:
        UserError: the folder holds no scans, or the target is not ours to write (see ``open_dataset``).
    """
    source = Path(source).absolute()
    scans, ignored = _find_scans(source)
    folder = open_dataset(dataset_id, name, modality=modality, source=source)
    ledger = _Ledger(folder, source, modality=modality)
    todo = [scan for scan in scans if not ledger.is_settled(scan)]
    staging = folder / ".incoming"
    tasks = [_Task(scan, staging / str(number), modality) for number, scan in enumerate(todo)]
    try:
        for finding in tqdm(_examine_all(tasks, processes), total=len(tasks), desc="prepare", unit="scan"):
            ledger.enter(finding)
    finally:
        ledger.save()
        shutil.rmtree(staging, ignore_errors=True)
    return PrepareSummary(
        folder=folder,
        added=tuple(ledger.added),
        known=len(scans) - len(todo) - ledger.refused_before,
        rejected=tuple(sorted(ledger.rejected.values(), key=lambda row: row.source)),
        ignored=ignored,
        missing=tuple(row.case for row in ledger.origins.values() if not Path(row.source).exists()),
    )


class _Ledger:
    """The dataset's cases and refusals: decides what a finding becomes, and puts its files in place."""

    def __init__(self, folder: Path, root: Path, *, modality: str):
        self.folder, self.root, self.modality = folder, root, modality
        self.origins = {row.source: row for row in read_rows(folder / PROVENANCE_FILE, Origin)}
        refused = read_rows(folder / REJECTED_FILE, Rejection)
        self.rejected_before = {r.source: r for r in refused if Path(r.source).is_relative_to(root)}
        self.rejected_elsewhere = [r for r in refused if not Path(r.source).is_relative_to(root)]
        self.rejected: dict[str, Rejection] = {}
        self.refused_before = 0
        self.added: list[str] = []
        self.by_voxels = {row.voxels_sha256: row for row in self.origins.values()}
        self.source_lost = any(not Path(row.source).exists() for row in self.origins.values())
        self.names = {row.case.casefold() for row in self.origins.values()}  # some file systems ignore case

    def is_settled(self, scan: Path) -> bool:
        """Whether an earlier run has decided on this file and it has not changed since."""
        key, stamp = str(scan), source_stamp(scan)
        refusal = self.rejected_before.get(key)
        if refusal is not None and stamp and refusal.stamp == stamp and not self._may_be_wanted_now(refusal):
            self.rejected[key] = refusal
            self.refused_before += 1
            return True
        row = self.origins.get(key)
        if row is None or not stamp:
            return False
        present = image_path(self.folder, row.case).exists() and label_path(self.folder, row.case).exists()
        if present and row.stamp == stamp:
            return True
        if present and row.sha256 == source_sha256(scan):
            self.origins[key] = replace(row, stamp=stamp)
            return True
        log.warning("%s has changed since it was taken as case %s; it is taken anew.", scan, row.case)
        self._withdraw(row)
        return False

    def enter(self, finding: _Finding) -> None:
        """Accept or refuse one examined file."""
        source, row = str(finding.task.source), finding.origin
        if row is None:
            self._refuse(source, finding.reason)
            return
        twin, name = self.by_voxels.get(row.voxels_sha256), None
        if twin is not None:
            if Path(twin.source).exists():
                self._refuse(source, f"{_DUPLICATE}: the same voxels as {twin.source} (case {twin.case})")
                return
            name = twin.case  # the same scan has moved: its case goes on from the new place
            self._withdraw(twin)
        self._accept(replace(row, case=name or self._free_name(finding.task.source, row.sha256)), finding.task)

    def save(self) -> None:
        """Write the two tables and dataset.json."""
        for row in self.rejected_before.values():
            if row.source not in self.rejected and row.source not in self.origins and Path(row.source).exists():
                self.rejected[row.source] = row  # an interrupted run did not come to it again
        refused = [*self.rejected_elsewhere, *self.rejected.values()]
        write_rows(self.folder / PROVENANCE_FILE, Origin, sorted(self.origins.values(), key=lambda row: row.case))
        write_rows(self.folder / REJECTED_FILE, Rejection, sorted(refused, key=lambda row: row.source))
        write_dataset_json(self.folder, modality=self.modality, cases=len(self.origins))

    def _accept(self, row: Origin, task: _Task) -> None:
        image, label = image_path(self.folder, row.case), label_path(self.folder, row.case)
        image.parent.mkdir(exist_ok=True)
        label.parent.mkdir(exist_ok=True)
        os.replace(task.staging / "label.nii.gz", label)
        if row.status == "rewritten":
            os.replace(task.staging / "image.nii.gz", image)
        else:
            row = replace(row, status=_link(task.source, task.staging / "link", image))
        self.origins[row.source] = self.by_voxels[row.voxels_sha256] = row
        self.names.add(row.case.casefold())
        self.added.append(row.case)

    def _refuse(self, source: str, reason: str) -> None:
        self.rejected[source] = Rejection(source=source, reason=reason, stamp=source_stamp(Path(source)))

    def _may_be_wanted_now(self, refusal: Rejection) -> bool:
        return self.source_lost and refusal.reason.startswith(_DUPLICATE)

    def _withdraw(self, row: Origin) -> None:
        del self.origins[row.source]
        self.by_voxels.pop(row.voxels_sha256, None)
        self.names.discard(row.case.casefold())
        image_path(self.folder, row.case).unlink(missing_ok=True)
        label_path(self.folder, row.case).unlink(missing_ok=True)

    def _free_name(self, source: Path, sha256: str) -> str:
        relative = source.relative_to(self.root).as_posix()
        name = case_name(relative[: -len(ending_of(source))])
        if name.casefold() not in self.names:
            return name
        lengths = (length for length in range(8, 65) if f"{name}_{sha256[:length]}".casefold() not in self.names)
        return f"{name}_{sha256[: next(lengths)]}"


def _find_scans(source: Path) -> tuple[list[Path], int]:
    """Every scan below a folder in the order of its path, and how many other files lie there."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder.", "Give the folder of the scans: -i DIR")
    scans, ignored = [], 0
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            is_scan = not name.startswith(".") and ending_of(Path(name)) is not None
            scans += [Path(folder) / name] if is_scan else []
            ignored += not is_scan
    if not scans:
        raise UserError(f"{source} holds no scans.", f"Scans end in {', '.join(ENDINGS)}.")
    return sorted(scans, key=lambda path: path.relative_to(source).as_posix()), ignored


def _examine_all(tasks: list[_Task], processes: int) -> Iterator[_Finding]:
    """Findings in the order of the tasks."""
    if min(processes, len(tasks)) <= 1:
        yield from map(_examine, tasks)
        return
    pool = ProcessPoolExecutor(min(processes, len(tasks)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_examine, tasks)
    except BrokenProcessPool as error:
        raise UserError("A worker was killed, likely for want of memory.", "Run it again with -np 1.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _examine(task: _Task) -> _Finding:
    """Read one file, and stage its body mask (and its rewritten image) where it is good."""
    try:
        scan = load_scan(task.source)
    except RejectedScan as reason:
        return _Finding(task, reason=str(reason))
    mask = body_mask(scan.array, scan.image.affine, modality=task.modality)
    _write_bytes(task.staging / "label.nii.gz", stored_bytes(_like(scan, mask)))
    linked = ending_of(task.source) == FILE_ENDING
    if not linked:
        _write_bytes(task.staging / "image.nii.gz", stored_bytes(scan.image))
    origin = Origin(
        case="",
        source=str(task.source),
        sha256=source_sha256(task.source),
        shape="x".join(str(size) for size in scan.array.shape),
        spacing_mm="x".join(f"{size:.6g}" for size in scan.spacing),
        orientation=scan.orientation,
        status="linked" if linked else "rewritten",
        voxels_sha256=scan.voxels_sha256(),
        stamp=source_stamp(task.source),
    )
    return _Finding(task, origin=origin)


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
