"""Reading JSON with one kind of error, and writing files so that an interruption never leaves half of one behind."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError

_JSON_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", type(None): "null"}


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
