"""The voxels of a stack, by SimpleITK (GDCM), in the unit that slope and intercept give them."""

import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnssl_plugin.intake.dicom.files import ExportFile, on_disk
from nnssl_plugin.intake.dicom.headers import Frame
from nnssl_plugin.io.refusals import RejectedScan, check_memory

_JPEG2000 = re.compile(rb"\xfe\xff\x00\xe0.{4}\xff\x4f\xff\x51.{4}(.{16})", re.DOTALL)
"""A fragment of pixels (PS3.5, A.4) that begins a codestream (ISO 15444-1, A.5.1: SOC, SIZ, then the picture's far and
near edges in columns and rows)."""


def read_planes(frames: Sequence[Frame], rows: int, columns: int) -> np.ndarray:
    """The planes (I, J, K) float32 with axes column, row, plane, in the order of ``frames``, rescaled.

    Every file is read by itself: slope and intercept differ between the files of a PET series, and between the frames
    of an enhanced object.

    Raises:
        RejectedScan: a file is damaged, compressed in a way that GDCM does not read, or of another size.
        UnavailableScan: there is too little memory.
    """
    check_memory(rows * columns * len(frames), 4)
    array = np.empty((columns, rows, len(frames)), dtype=np.float32)
    files = list(dict.fromkeys(frame.file for frame in frames))
    with on_disk(files) as paths:
        for file, path in zip(files, paths, strict=True):
            members = [(k, frame) for k, frame in enumerate(frames) if frame.file == file]
            _check_codestreams(path, file, rows, columns)
            planes = _read_file(path, file)
            if planes.shape[1:] != (rows, columns) or max(frame.number for _, frame in members) >= len(planes):
                raise RejectedScan(f"damaged: {file.name} holds planes {planes.shape}, its header says otherwise")
            for k, frame in members:
                factor, offset = frame.correction
                plane = planes[frame.number].T
                array[..., k] = plane if (factor, offset) == (1.0, 0.0) else factor * plane + offset
    return array


def same_pixels(frames: Sequence[Frame]) -> bool:
    """Whether planes hold the same values."""
    files = list(dict.fromkeys(frame.file for frame in frames))
    with on_disk(files) as paths:
        planes = {file: _read_file(path, file) for file, path in zip(files, paths, strict=True)}
    first, *others = [planes[frame.file][frame.number] for frame in frames]
    return all(np.array_equal(first, other) for other in others)


def _check_codestreams(path: Path, file: ExportFile, rows: int, columns: int) -> None:
    """GDCM allocates what a JPEG 2000 codestream says of itself, before it compares that with the header."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in _JPEG2000.finditer(content):
            right, lower, left, upper = np.frombuffer(found[1], ">u4").astype(np.int64)
            if (lower - upper, right - left) != (rows, columns):
                raise RejectedScan(
                    f"damaged: {file.name} holds a picture of {lower - upper} x {right - left}, its header says "
                    f"{rows} x {columns}"
                )


def _read_file(path: Path, file: ExportFile) -> np.ndarray:
    """The frames (N, rows, columns) of a file."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.SetFileName(path.as_posix().encode("utf-8").decode())
        array = SimpleITK.GetArrayFromImage(reader.Execute())
    except (RuntimeError, UnicodeEncodeError) as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1][:120]
        raise RejectedScan(f"GDCM cannot read the pixels of {file.name}: {reason}") from error
    return array if array.ndim == 3 else array[np.newaxis]
