"""What a run is about to do, judged by names, sizes and headers, before anything is written."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel

from nnssl_plugin.intake.tasks import Source, Task
from nnssl_plugin.io.scans import (
    MOST_GZIP_RATIO,
    NIFTI_ENDINGS,
    READ_ERRORS,
    RejectedScan,
    check_openable,
    ending_of,
)

SECONDS_PER_FILE, VOXELS_PER_SECOND = 0.02, 5e6
"""Of one process, as ``benchmarks/prepare_speed.py`` measured them on one core of a server."""
MASK_BYTES_PER_VOXEL = 0.02
"""Of compressed body masks, measured there."""


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
    voxels = [_voxels(source.path, size) for source, size in zip(sources, sizes, strict=True)]
    rewritten = sum(size for source, size in zip(sources, sizes, strict=True) if not _is_linked(source))
    return Preview(
        known=known,
        cases=len(tasks),
        files=len(sources),
        read=sum(sizes),
        voxels=sum(voxels),
        written=rewritten + int(MASK_BYTES_PER_VOXEL * sum(voxels)),
        free=shutil.disk_usage(folder).free,
        seconds=(SECONDS_PER_FILE * len(sources) + sum(voxels) / VOXELS_PER_SECOND) / max(1, processes),
    )


def _is_linked(source: Source) -> bool:
    return ending_of(source.path) in (".nii.gz", None) and len(source.channels) == 1


def _size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0


def _voxels(path: Path, size: int) -> int:
    """Voxels by the header of a NIfTI file, at most what its bytes can hold; of others, two bytes each."""
    if ending_of(path) not in NIFTI_ENDINGS:
        return size // 2
    try:
        check_openable(path)
        return min(math.prod(nibabel.load(path).shape), size * MOST_GZIP_RATIO)
    except (RejectedScan, *READ_ERRORS):
        return 0
