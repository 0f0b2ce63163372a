"""Slices that a person struck: they stay in ``triplets.jsonl``, and nothing learns from them.

``struck_triplets.csv`` in a raw dataset has the columns ``case,plane,slice``. The review page exports the same with a
column ``struck`` (``yes`` or ``no``: taken back).
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.planes import PLANES

STRUCK_FILE = "struck_triplets.csv"
COLUMNS = ("case", "plane", "slice")

SliceKey = tuple[str, str, int]
"""Case, plane and slice."""


def read_struck(raw_folder: Path) -> set[SliceKey]:
    """The struck slices of a raw dataset; none where nobody struck any.

    Raises:
        UserError: the table is malformed.
    """
    path = Path(raw_folder) / STRUCK_FILE
    return {key for key, struck in _rows(path) if struck} if path.is_file() else set()


def strike(raw_folder: Path, decisions: Path) -> tuple[int, int]:
    """Take a person's decisions into the struck slices of a raw dataset.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX_NAME``.
        decisions: table with the columns case, plane, slice, and maybe struck (without it, all are).

    Returns:
        how many slices are newly struck, and how many are taken back.

    Raises:
        UserError: a table is malformed, or the dataset has no case of that name.
    """
    before = read_struck(raw_folder)
    after = set(before)
    for key, struck in _rows(decisions):
        (after.add if struck else after.discard)(key)
    with atomic_path(Path(raw_folder) / STRUCK_FILE) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted(after))
    return len(after - before), len(before - after)


def _rows(path: Path) -> Iterator[tuple[SliceKey, bool]]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path} has no column {' and '.join(sorted(missing))}.", _FORM)
            for row in reader:
                yield _decision(row, f"{path}, line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.", _FORM) from error


def _decision(row: dict[str, str], where: str) -> tuple[SliceKey, bool]:
    case, plane, index, struck = ((row.get(name) or "").strip() for name in (*COLUMNS, "struck"))
    if not case or plane not in PLANES or not index.isdecimal() or struck.lower() not in ("", "yes", "no"):
        raise UserError(f"{where}: {', '.join(map(str, row.values()))}", _FORM)
    return (case, plane, int(index)), struck.lower() != "no"


_FORM = "A table of struck slices has the columns case,plane,slice and may have struck (yes or no)."
