"""Which files below a folder are scans: links followed, patterns applied, DICOM recognised."""

import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.pictures import PICTURE_ENDINGS, is_picture
from nnssl_plugin.io.scans import ENDINGS, ending_of
from nnssl_plugin.io.text import printable

_DICOM_PREAMBLE, _DICOM_MAGIC = 128, b"DICM"


@dataclass(frozen=True)
class FoundFiles:
    """What lies below a folder."""

    scans: tuple[Path, ...]  # every volume, or where there is none every 2D image, in the order of the paths
    others: int = 0  # files that are no scans by their ending
    dicom: int = 0  # of these, those in DICOM format
    excluded: int = 0  # scans that the patterns leave out
    closed: tuple[str, ...] = ()  # folders that could not be opened
    loops: tuple[Path, ...] = ()  # links to a folder that holds the input folder: not followed


def find_scans(source: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> FoundFiles:
    """Find the scans below a folder; every folder is searched once, whatever links lead to it.

    Names that begin with a dot are left out.

    Args:
        source: the folder.
        include: patterns, see :func:`matches`; a scan must match one of them. None: all.
        exclude: a scan may match none of these.

    Raises:
        UserError: there is no such folder, or it holds no scans, or the patterns leave none.
    """
    if not source.is_dir():
        raise UserError(f"{printable(str(source))} is not a folder.", "Give the folder of the scans: -i DIR")
    scans, pictures, others, closed, loops = [], [], [], [], []
    for folder, names in _folders(source, closed, loops):
        for name in names:
            path, hidden = folder / name, name.startswith(".")
            is_scan, is_image = not hidden and ending_of(path) is not None, not hidden and is_picture(path)
            (scans if is_scan else pictures if is_image else others).append(path)
    found, rest = (scans, [*others, *pictures]) if scans else (pictures, others)
    dicom = sum(map(is_dicom, others))
    if not found:
        raise _nothing_found(source, dicom)
    relative = {path: path.relative_to(source).as_posix() for path in found}
    wanted = [p for p in found if (not include or matches(relative[p], include)) and not matches(relative[p], exclude)]
    if not wanted:
        raise UserError(
            f"The patterns leave none of the {len(found)} scans below {printable(str(source))}.",
            f"Patterns are compared with paths such as {printable(min(relative.values()))!r}: --include, --exclude",
        )
    return FoundFiles(
        scans=tuple(sorted(wanted, key=relative.__getitem__)),
        others=len(rest),
        dicom=dicom,
        excluded=len(found) - len(wanted),
        closed=tuple(closed),
        loops=tuple(loops),
    )


def matches(relative: str, patterns: Sequence[str]) -> bool:
    """Whether a path below the input folder, with forward slashes, or its last part, matches a pattern.

    ``*`` stands for any characters, ``/`` included, ``?`` for one, ``[abc]`` for one of these; case counts.
    """
    name = relative.rpartition("/")[2]
    return any(fnmatchcase(relative, pattern) or fnmatchcase(name, pattern) for pattern in patterns)


def is_dicom(path: Path) -> bool:
    """Whether a regular file is in DICOM format (PS3.10: 128 bytes, then ``DICM``)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as stream:
            start = stream.read(_DICOM_PREAMBLE + len(_DICOM_MAGIC))
    except OSError:
        return False
    return start[_DICOM_PREAMBLE:] == _DICOM_MAGIC


def _folders(source: Path, closed: list[str], loops: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below ``source`` with the names of its files: first those within, then those that links lead to."""
    above = {_identity(folder) for folder in source.resolve().parents}
    seen, tops = set(), deque([source])

    def note(error: OSError) -> None:
        closed.append(f"{printable(str(error.filename))}: {error.strerror}")

    while tops:
        for folder, subfolders, names in os.walk(tops.popleft(), onerror=note):
            here = Path(folder)
            identity = _identity(here)
            if identity in above:
                loops.append(here)
            if identity is None or identity in above or identity in seen:
                subfolders.clear()
                continue
            seen.add(identity)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            tops.extend(here / name for name in subfolders if (here / name).is_symlink())
            yield here, names


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _nothing_found(source: Path, dicom: int) -> UserError:
    if dicom:
        return UserError(
            f"{printable(str(source))} holds {dicom} DICOM files and no scans that prepare reads.",
            f"Convert them first: dcm2niix -z y -o NIFTI_DIR {printable(str(source))}, then prepare -i NIFTI_DIR",
        )
    endings = ", ".join((*ENDINGS, *PICTURE_ENDINGS))
    return UserError(f"{printable(str(source))} holds no scans.", f"Scans end in {endings}.")
