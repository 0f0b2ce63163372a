"""The table of every series of an export: what became of it, and why. It is local: it holds paths and identifiers."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnssl_plugin.intake.dicom.headers import SHOWN
from nnssl_plugin.io.files import atomic_path

SERIES_FILE = "series.csv"
TAKEN, LEFT_OUT, REFUSED = "taken", "left out", "refused"
"""A series is left out by a rule; it is refused where it cannot be used."""
COLUMNS = (
    *("status", "reason", "notes", "scan", "channel", "subject", "slices", "part", *SHOWN, "burnt_in", "structures"),
    *("files", "folder", "StudyInstanceUID", "SeriesInstanceUID"),
)
_KEY = ("StudyInstanceUID", "SeriesInstanceUID", "part")

SeriesRow = dict[str, str]
"""One stack or other object, with the columns of :data:`COLUMNS`."""


def read_series(path: Path) -> list[SeriesRow]:
    """The rows of a table; none where there is no table."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(stream)]


def write_series(path: Path, rows: Iterable[SeriesRow]) -> None:
    """Write the rows, readable by the owner alone."""
    ordered = sorted(rows, key=lambda row: (row["folder"], row["scan"], *_key(row)))
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(ordered)
    path.chmod(0o600)


def merged(earlier: Sequence[SeriesRow], rows: Sequence[SeriesRow]) -> list[SeriesRow]:
    """The rows of earlier exports, and ``rows`` in the place of those about the same series."""
    new = {_key(row) for row in rows}
    return [*(row for row in earlier if _key(row) not in new), *rows]


def count_reasons(rows: Sequence[SeriesRow]) -> list[str]:
    """Reasons with how many series each left out, the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        kind = row["reason"].partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return [f"{count} x {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _key(row: SeriesRow) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)
