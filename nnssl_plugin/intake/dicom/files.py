"""Every file of an export, in nested folders and zip files, one after another."""

import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import BinaryIO

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.pictures import is_picture
from nnssl_plugin.io.memory import available_memory
from nnssl_plugin.io.scans import ending_of

DICOM_ENDINGS = (".dcm", ".dicom", ".ima", "")
"""Of files that may be DICOM without its preamble, as early ones are; files with the preamble may be named anyhow."""
MAGIC_AT, MAGIC = 128, b"DICM"


@dataclass(frozen=True)
class ExportFile:
    """A file, or a member of a zip file."""

    path: Path
    member: str = ""

    def __str__(self):
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """The last part of its name."""
        return (self.member or self.path.name).rpartition("/")[2]

    @property
    def size(self) -> int:
        """Bytes, of a member when it is unpacked."""
        return _archive(self.path).getinfo(self.member).file_size if self.member else self.path.stat().st_size

    @property
    def stamp(self) -> str:
        """Size and time of change, by which an unchanged file is recognised."""
        found = self.path.stat()
        return f"{self}:{found.st_size}@{found.st_mtime_ns}"


def require_pydicom() -> ModuleType:
    """The package that reads headers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError(
            "DICOM files need the package pydicom.",
            'Run: pip install "nnssl_plugin[dicom]"; or convert them: dcm2niix -z y -o NIFTI_DIR DIR',
        ) from error
    return pydicom


def find_files(source: Path) -> Iterator[ExportFile]:
    """The regular files below a folder (or of one zip file) and the members of its zip files, in order.

    Links are followed, each folder is searched once; names that begin with a dot are left out.
    """
    for path in _regular_files(source):
        if _is_zip(path):
            members = [info.filename for info in _archive(path).infolist() if not info.is_dir()]
            yield from (ExportFile(path, member) for member in sorted(members))
        else:
            yield ExportFile(path)


def is_export(source: Path) -> bool:
    """Whether a folder (or zip file) holds DICOM files and no volumes in another format."""
    found = False
    for file in find_files(source):
        if not file.member and ending_of(file.path) is not None:
            return False
        found = found or (not is_picture(file.path) and starts_as_dicom(file))
    return found


def starts_as_dicom(file: ExportFile) -> bool:
    """Whether a file has DICOM's preamble (PS3.10: 128 bytes, then ``DICM``)."""
    try:
        with open_file(file, limit=MAGIC_AT + len(MAGIC)) as stream:
            return stream.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


@contextmanager
def open_file(file: ExportFile, *, limit: int | None = None) -> Iterator[BinaryIO]:
    """The bytes of a file; a member of a zip file is held in memory, to its stated size and not beyond.

    Args:
        file: which one.
        limit: bytes from its start that suffice; None: all.

    Raises:
        OSError, RuntimeError (a password), zipfile.BadZipFile: it cannot be opened.
        MemoryError: a member states more than the memory that is free.
    """
    if not file.member:
        with file.path.open("rb") as stream:
            yield stream
        return
    archive = _archive(file.path)
    size = archive.getinfo(file.member).file_size
    free = available_memory()
    if limit is None and free is not None and size > free:
        raise MemoryError(f"{file.member} has {size} bytes, {free} are free")
    with archive.open(file.member) as member:
        yield BytesIO(member.read(size if limit is None else limit))


@contextmanager
def on_disk(files: list[ExportFile]) -> Iterator[list[Path]]:
    """Paths of files for readers that need them; members of zip files lie in a temporary folder until the end."""
    with TemporaryDirectory(prefix="nnssl_plugin_dicom_") as folder:
        paths = []
        for number, file in enumerate(files):
            path = file.path
            if file.member:
                path = Path(folder, f"{number}.dcm")
                with open_file(file) as stream:
                    path.write_bytes(stream.read())
            paths.append(path)
        yield paths


def _regular_files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    seen = set()
    for folder, subfolders, names in os.walk(source, followlinks=True):
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and _is_regular(path):
                yield path


@lru_cache(maxsize=2)
def _archive(path: Path) -> zipfile.ZipFile:
    """An open zip file; its list of members is read once and not for every member."""
    return zipfile.ZipFile(path)


def _is_zip(path: Path) -> bool:
    return path.name.lower().endswith(".zip") and zipfile.is_zipfile(path)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
