"""Reading JSON with one kind of error, and writing files so that an interruption never leaves half of one behind."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError

_JSON_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", type(None): "null"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Full disk, quota, size limit, read-only file system, permissions, broken disk."""
TEMPORARY = re.compile(r"\..+(\.nii\.gz|\.[^.]+)\.[a-z0-9_]{8}\1")
"""Names that :func:`atomic_path` gives to files with a suffix: a dot, the name, eight random characters, the suffix."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it to disk and rename it to ``path``.

    Readers see the old file or the new one, never a part. On an exception the old file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept because numpy and nibabel choose the format by it
    suffix = "".join(path.suffixes[-2:]) if path.suffixes[-2:-1] == [".nii"] else path.suffix
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_temporary_files(folder: str | Path) -> None:
    """Remove what killed processes left of their :func:`atomic_path` in a folder; for whoever alone writes there."""
    for found in Path(folder).glob(".*"):
        if TEMPORARY.fullmatch(found.name):
            found.unlink(missing_ok=True)


def keep_file(path: Path, kept: Path) -> None:
    """Let ``kept`` be what ``path`` is now, without a moment in which either is missing: a hard link, else a copy."""
    with atomic_path(kept) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


@contextmanager
def disk_errors_in_words(folder: str | Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and their like into a :class:`UserError` that names the file or folder.

    Raises:
        UserError: what the system said; everything written before is still there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"{error.filename or folder}: {os.strerror(error.errno)}. Everything written before is kept.",
            "Free space or make the folder writable, then run the same command again (a training: with --c).",
        ) from error


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path, kind: type | None = None) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Args:
        path: the file.
        kind: ``dict`` or ``list``, what has to stand at the top level; None: anything.

    Raises:
        UserError: the file cannot be opened, is no such text, is no JSON (with its line), or another kind.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Restore it, or check the path.") from error
    try:
        content = json.loads(raw)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON, line {error.lineno}, column {error.colno}: {error.msg}.",
            "Correct the line (no comma after the last entry, double quotes, no comments), or restore the file.",
        ) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 text, line {line}.", "Save it as UTF-8.") from error
    except (RecursionError, ValueError) as error:  # of ValueErrors, that of numbers with thousands of digits
        raise UserError(
            f"{path} is nested too deeply, or holds too long a number, to be read.", "Restore the file."
        ) from error
    if kind is not None and not isinstance(content, kind):
        found, wanted = (_JSON_NAMES.get(k, k.__name__) for k in (type(content), kind))
        raise UserError(f"{path} holds {found} at its top level where {wanted} is expected.", "Restore the file.")
    return content


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
