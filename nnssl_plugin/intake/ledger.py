"""The two tables beside a prepared dataset: where each case came from, and what was refused and why."""

import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.itk_files import file_parts

PROVENANCE_FILE = "provenance.csv"
REJECTED_FILE = "rejected.csv"
LABEL = "label"
"""Channel of the file that holds the segmentation of a case."""

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python holds a byte of a path that is not UTF-8 (PEP 383)
_ESCAPED = re.compile(r"\\(?:x5c|udc([89a-f][0-9a-f]))")

Row = TypeVar("Row")


@dataclass(frozen=True)
class Origin:
    """One file of an accepted case: the case, where it has one channel."""

    case: str
    source: str  # absolute path
    sha256: str  # of the source's bytes
    shape: str  # voxels along the stored axes, "35x51x35"
    spacing_mm: str
    orientation: str  # of the source, for example LPS
    status: str  # linked, copied (where links are not possible), rewritten, or made grey (rewritten without its colour)
    voxels_sha256: str  # the same for the same voxels in another container
    stamp: str  # size and time of change, by which an unchanged source is recognised
    body_share: str = ""  # share of the image that the body mask takes, 0 to 1; earlier versions did not write it
    percentiles: str = ""  # 1st, 50th and 99th of the intensities within the mask, "12;80;310"
    channel: str = ""  # which of several channels it is ("0 1 2" for a 4D file), or "label"; empty where there is one


@dataclass(frozen=True)
class Rejection:
    """One refused file."""

    source: str
    reason: str
    stamp: str


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a table written by :func:`write_rows`, paths that are not UTF-8 included; an absent file is an empty table.

    Raises:
        UserError: a column is missing.
    """
    if not path.is_file():
        return []
    names = [field.name for field in fields(kind)]
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        missing = needed - set(reader.fieldnames or ())
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(sorted(missing))}.",
                "Restore it, or prepare the scans into a dataset of another ID.",
            )
        return [kind(**{name: _unescaped(line.get(name) or "") for name in names}) for line in reader]


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write a table as CSV in UTF-8 with a header line, atomically.

    A byte of a path that is not UTF-8 is written as its escape, ``\\udcfc`` for 0xFC; :func:`read_rows` undoes it.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=[field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows({name: _escaped(text) for name, text in asdict(row).items()} for row in rows)


def source_stamp(path: Path) -> str:
    """Size and time of change of the files that hold a scan, as text; empty where they cannot be asked."""
    try:
        stats = [part.stat() for part in file_parts(path)]
    except OSError:
        return ""
    return ";".join(f"{stat.st_size}@{stat.st_mtime_ns}" for stat in stats)


def source_sha256(path: Path) -> str:
    """SHA-256 over the bytes of the files that hold a scan."""
    digest = hashlib.sha256()
    for part in file_parts(path):
        with part.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def case_content(rows: Iterable[Origin]) -> str:
    """Hash of the voxels of a case, the same for the same images in other containers, whatever their labels."""
    images = sorted((row.channel, row.voxels_sha256) for row in rows if row.channel != LABEL)
    return images[0][1] if [channel for channel, _ in images] == [""] else text_sha256(map(" ".join, images))


def text_sha256(lines: Iterable[str]) -> str:
    """SHA-256 of some lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _escaped(text: str) -> str:
    text = re.sub(r"\\(?=x5c|udc[89a-f][0-9a-f])", r"\\x5c", text)  # what only looks like an escape
    return _NOT_UTF8.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(0xDC00 + int(found[1], 16)) if found[1] else "\\", text)
