"""Why a scan file is not taken: the file itself, or a cause outside of it; and what is looked at before it is read."""

import errno
import math
import struct
import zlib
from collections.abc import Iterable, Sequence

from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from nnssl_plugin.io.memory import available_memory

READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    MemoryError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    ImageFileError,
    HeaderDataError,
)
"""What readers raise for files that are not what they claim to be."""
BYTES_PER_VOXEL = 12
"""Memory that checking a scan and making its mask takes per voxel, beside the voxels as stored."""

_OUTSIDE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV,
    errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ELOOP,
}  # fmt: skip
"""Errors of the system that say nothing about the file itself."""


class RejectedScan(Exception):
    """A file that cannot become a case; the message says why, in one line."""


class UnavailableScan(RejectedScan):
    """A file that cannot become a case now, for a cause outside of it: permissions, a failing disk, too little memory.
    Trying again later makes sense."""


def check_memory(voxels: int, bytes_per_voxel: int) -> None:
    """Look whether an image of a header's size fits into the memory that is free, before any of it is read.

    Raises:
        UnavailableScan: it does not.
    """
    needed, free = voxels * (bytes_per_voxel + BYTES_PER_VOXEL), available_memory()
    if free is not None and needed > free:
        raise UnavailableScan(
            f"too large for the memory: {voxels} voxels need about {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB "
            "are free"
        )


def check_spacing(spacing: Sequence[float]) -> None:
    """Look whether voxels have edges.

    Raises:
        RejectedScan: one is zero, negative or no number.
    """
    if any(not math.isfinite(size) or size <= 0 for size in spacing):
        raise RejectedScan(f"spacing of zero or less: {in_mm(spacing)}")


def in_mm(sizes: Iterable[float]) -> str:
    """``[1, 2.5]`` → ``1 x 2.5 mm``."""
    return " x ".join(f"{size:.4g}" for size in sizes) + " mm"


def refusal(error: Exception, what: str) -> RejectedScan:
    """``error`` of reading a file as a refusal, by its cause: the file, or something outside of it."""
    outside = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OUTSIDE_ERRORS)
    return (
        UnavailableScan(f"cannot be read now: {one_line(error)}")
        if outside
        else RejectedScan(f"{what}: {one_line(error)}")
    )


def one_line(error: BaseException) -> str:
    """Kind and last line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:160]}" if lines else type(error).__name__
