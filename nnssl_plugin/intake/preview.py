"""What a run is about to do, judged by names, sizes and headers, before anything is written."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel

from nnssl_plugin.intake.overview import ranges, reason_kind
from nnssl_plugin.intake.plausibility import doubt_by_name
from nnssl_plugin.intake.tasks import Source, Task
from nnssl_plugin.io.refusals import READ_ERRORS, RejectedScan
from nnssl_plugin.io.scans import MOST_GZIP_RATIO, NIFTI_ENDINGS, check_openable, ending_of, nifti_unit_mm

SECONDS_PER_FILE, VOXELS_PER_SECOND = 0.02, 5e6
"""Of one process, rounded from real MR, PET and CT scans on one core of a server; for a duration in words, no more."""
MASK_BYTES_PER_VOXEL = 0.02
"""Of compressed body masks, rounded from the same scans."""


@dataclass(frozen=True)
class Preview:
    """What lies ahead of a run."""

    known: int  # cases that earlier runs have decided on
    cases: int  # to look at
    files: int  # that they have
    read: int  # bytes of these
    voxels: int  # by their headers; 0 of a file whose header says nothing
    written: int  # bytes that the dataset will take, about
    free: int  # bytes on its disk
    seconds: float  # with this many processes, about
    ranges: str = ""  # of size and spacing, by the headers of NIfTI files
    by_name: tuple[tuple[int, str], ...] = ()  # files that are going to be set aside for their names: how many, and why


def preview(tasks: Sequence[Task], *, known: int, folder: Path, processes: int) -> Preview:
    """Look at the headers of all files that a run is about to read.

    Args:
        tasks: the cases.
        known: cases that need no look.
        folder: of the dataset.
        processes: that share the work.
    """
    sources = [source for task in tasks for source in task.sources]
    sizes = [_size(source) for source in sources]
    headers = [_header(source.path, size) for source, size in zip(sources, sizes, strict=True)]
    voxels = sum(header.voxels for header in headers)
    rewritten = sum(size for source, size in zip(sources, sizes, strict=True) if not _is_linked(source))
    return Preview(
        known=known,
        cases=len(tasks),
        files=len(sources),
        read=sum(sizes),
        voxels=voxels,
        written=rewritten + int(MASK_BYTES_PER_VOXEL * voxels),
        free=shutil.disk_usage(folder).free,
        seconds=(SECONDS_PER_FILE * len(sources) + voxels / VOXELS_PER_SECOND) / max(1, processes),
        ranges=_ranges(headers),
        by_name=tuple(_doubts_by_name(tasks)),
    )


@dataclass(frozen=True)
class _Header:
    voxels: int
    shape: str = ""
    spacing_mm: str = ""


def _ranges(headers: Sequence[_Header]) -> str:
    known = [header for header in headers if header.shape]
    if not known:
        return ""
    shapes, spacings = [header.shape for header in known], [header.spacing_mm for header in known]
    return f"{ranges(shapes)} voxels of {ranges(spacings)} mm"


def _doubts_by_name(tasks: Sequence[Task]) -> list[tuple[int, str]]:
    """How many files will be set aside for what their names say; what their values say shows later."""
    doubts: Counter[str] = Counter()
    for task in tasks:
        for source in task.group.images:
            reason = doubt_by_name(source.relative, task.modalities[source.channels[0]])
            if reason and not source.keep:
                doubts[reason_kind(reason)] += 1
    return [(count, reason) for reason, count in doubts.most_common()]


def _is_linked(source: Source) -> bool:
    return ending_of(source.path) in (".nii.gz", None) and len(source.channels) == 1


def _size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0


def _header(path: Path, size: int) -> _Header:
    """What the header of a NIfTI file says, voxels at most as its bytes can hold; of others, two bytes for each."""
    if ending_of(path) not in NIFTI_ENDINGS:
        return _Header(size // 2)
    try:
        check_openable(path)
        image = nibabel.load(path)
        voxels = math.prod(image.shape)
        spacing = [float(edge) * nifti_unit_mm(image.header) for edge in image.header.get_zooms()[:3]]
    except (RejectedScan, *READ_ERRORS):
        return _Header(0)
    if voxels > size * MOST_GZIP_RATIO or not all(map(math.isfinite, spacing)):
        return _Header(min(voxels, size * MOST_GZIP_RATIO))
    return _Header(voxels, "x".join(map(str, image.shape)), "x".join(f"{edge:.6g}" for edge in spacing))
