"""The files of an index of embeddings: vectors, a table with a row for each, and what made them; it grows by appending.

What ``index.json`` counts is there; what a killed process wrote beyond it is cut off by the next writer. So vectors
are appended first, then rows of the table, then ``index.json`` is replaced. Removing rows writes both files under new
names, which ``index.json`` then names.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, disk_errors_in_words, read_json, remove_temporary_files, write_json
from nnssl_plugin.io.lock import locked

INDEX_FILE, LOCK_FILE, STATISTICS_FILE = "index.json", "index.lock", "statistics.npy"
FORMAT = 1
"""Version of the layout, raised when a field changes its meaning."""
COLUMNS = ("case", "part", "subject", "image")
"""Of every table: the case, which part of it (empty for the whole), its subject, and its file (the first channel's)."""
FLOAT = np.dtype("<f4")


class VectorStore:
    """The folder of an index, as one moment shows it.

    Args:
        folder: of the index.

    Raises:
        UserError: it holds no index, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX_FILE).is_file():
            raise UserError(
                f"{self.folder} holds no index of embeddings.",
                f"Make one: nnssl_plugin embed -m CHECKPOINT -i IMAGES -o {self.folder}",
            )
        self.facts: dict[str, Any] = read_json(self.folder / INDEX_FILE, dict)
        if self.facts.get("format") != FORMAT:
            raise UserError(
                f"{self.folder / INDEX_FILE} has the format {self.facts.get('format')!r}; this version reads {FORMAT}.",
                "Use the version of nnssl_plugin that wrote it.",
            )

    @property
    def rows(self) -> int:
        """How many vectors there are."""
        return self.facts["rows"]

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.facts["dimensions"]

    @property
    def vectors_file(self) -> Path:
        """The vectors, as NumPy's format 1.0 holds them."""
        return self.folder / _named("vectors", self.facts["generation"], ".npy")

    @property
    def table_file(self) -> Path:
        """The table of cases."""
        return self.folder / _named("cases", self.facts["generation"], ".csv")

    def vectors(self) -> np.ndarray:
        """(rows, dimensions) float32, mapped into memory: nothing is read before it is used.

        Raises:
            UserError: the file holds fewer vectors than ``index.json`` counts.
        """
        if not self.rows:
            return np.zeros((0, self.dimensions), dtype=FLOAT)
        start = _header_length(self.vectors_file)
        if self.vectors_file.stat().st_size < start + self.rows * self.dimensions * FLOAT.itemsize:
            raise _damaged(self.vectors_file)
        return np.memmap(self.vectors_file, FLOAT, mode="r", offset=start, shape=(self.rows, self.dimensions))

    def table(self) -> list[dict[str, str]]:
        """A row for each vector, as text.

        Raises:
            UserError: the file has fewer rows than ``index.json`` counts.
        """
        rows = _read_rows(self.table_file)[: self.rows]
        if len(rows) < self.rows:
            raise _damaged(self.table_file)
        return rows

    def statistics(self) -> np.ndarray | None:
        """Mean and standard deviation (2, dimensions) float64 of the vectors that the index was first built of; None
        before that was finished."""
        return np.load(self.folder / STATISTICS_FILE, allow_pickle=False) if self.facts["frozen"] else None


class StoreWriter(VectorStore):
    """A store that this process alone may write to; see :func:`writing`."""

    def append(self, vectors: np.ndarray, rows: Sequence[Mapping[str, str]]) -> None:
        """Add vectors (n, dimensions) and their rows, all of them or, if killed, none.

        Raises:
            UserError: the vectors have another length or hold NaN, the disk is full.
        """
        if vectors.shape != (len(rows), self.dimensions) or not np.isfinite(vectors).all():
            raise UserError(
                f"Vectors {vectors.shape} for {len(rows)} rows do not fit {self.folder} or hold NaN.",
                f"It takes finite vectors of {self.dimensions} numbers.",
            )
        with disk_errors_in_words(self.folder):
            self._grow_columns(rows)
            _append(self.vectors_file, np.ascontiguousarray(vectors, dtype=FLOAT).tobytes())
            _append(self.table_file, _as_csv(rows, self._columns).encode())
            self.commit(rows=self.rows + len(rows))
            _write_header(self.vectors_file, self.rows, self.dimensions)

    def remove(self, keep: np.ndarray) -> None:
        """Keep the rows (rows,) bool alone: new files, then ``index.json``, then the old files go."""
        generation = self.facts["generation"] + 1
        old, kept = (self.vectors_file, self.table_file), np.flatnonzero(keep)
        vectors, table = self.vectors(), self.table()
        with disk_errors_in_words(self.folder):
            with atomic_path(self.folder / _named("vectors", generation, ".npy")) as temporary:
                _write_header(temporary, len(kept), self.dimensions)
                with open(temporary, "ab") as file:
                    for start in range(0, len(kept), 4096):
                        file.write(np.ascontiguousarray(vectors[kept[start : start + 4096]]).tobytes())
            with atomic_path(self.folder / _named("cases", generation, ".csv")) as temporary:
                text = _as_csv([table[row] for row in kept], self._columns, header=True)
                temporary.write_text(text, encoding="utf-8", newline="")
            self.commit(rows=len(kept), generation=generation)
            for path in old:
                path.unlink(missing_ok=True)

    def freeze(self, statistics: np.ndarray) -> None:
        """Set mean and standard deviation (2, dimensions), once and for all."""
        with disk_errors_in_words(self.folder):
            with atomic_path(self.folder / STATISTICS_FILE) as temporary:
                np.save(temporary, np.asarray(statistics, dtype=np.float64))
            self.commit(frozen=True)

    def commit(self, **changes: Any) -> None:
        """Replace ``index.json`` with these fields changed."""
        self.facts |= changes
        write_json(self.folder / INDEX_FILE, self.facts)

    @property
    def _columns(self) -> list[str]:
        return self.facts["columns"]

    def _grow_columns(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Rows that are there get empty cells in columns that come with new ones."""
        added = list(dict.fromkeys(name for row in rows for name in row if name not in self._columns))
        if not added:
            return
        table, columns = self.table(), [*self._columns, *added]
        with atomic_path(self.table_file) as temporary:
            temporary.write_text(_as_csv(table, columns, header=True), encoding="utf-8", newline="")
        self.commit(columns=columns)

    def _repair(self) -> None:
        """Cut off what a killed process left beyond what ``index.json`` counts."""
        remove_temporary_files(self.folder)
        for path in (*self.folder.glob("vectors*.npy"), *self.folder.glob("cases*.csv")):
            if path not in (self.vectors_file, self.table_file):
                path.unlink()
        if not self.vectors_file.is_file():
            _write_header(self.vectors_file, 0, self.dimensions)
        table = _read_rows(self.table_file) if self.table_file.is_file() else []
        if len(table) < self.rows:
            raise _damaged(self.table_file)
        _write_header(self.vectors_file, self.rows, self.dimensions)
        os.truncate(self.vectors_file, self._size_of_vectors())
        with atomic_path(self.table_file) as temporary:
            text = _as_csv(table[: self.rows], self._columns, header=True)
            temporary.write_text(text, encoding="utf-8", newline="")

    def _size_of_vectors(self) -> int:
        size = _header_length(self.vectors_file) + self.rows * self.dimensions * FLOAT.itemsize
        if self.vectors_file.stat().st_size < size:
            raise _damaged(self.vectors_file)
        return size


@contextmanager
def writing(folder: str | Path, new: Mapping[str, Any] | None = None) -> Iterator[StoreWriter]:
    """Be the one writer of an index; what an interruption left half done is repaired first.

    Args:
        folder: of the index.
        new: where there is no index yet, make one with these facts: ``dimensions``, and anything that JSON holds.

    Raises:
        UserError: another process writes there, or there is no index and none is to be made.
    """
    folder = Path(folder)
    if new is None:
        VectorStore(folder)
    with locked(folder / LOCK_FILE), disk_errors_in_words(folder):
        if not (folder / INDEX_FILE).is_file():
            start = {"format": FORMAT, "rows": 0, "generation": 0, "columns": list(COLUMNS), "frozen": False}
            write_json(folder / INDEX_FILE, start | dict(new or {}))
        store = StoreWriter(folder)
        store._repair()
        yield store


def _named(stem: str, generation: int, ending: str) -> str:
    return f"{stem}_{generation}{ending}" if generation else f"{stem}{ending}"


def _header(rows: int, dimensions: int) -> bytes:
    """NumPy leaves room for the first axis to grow, so that all headers of a file have one length."""
    written = io.BytesIO()
    npy.write_array_header_1_0(written, {"descr": "<f4", "fortran_order": False, "shape": (rows, dimensions)})
    return written.getvalue()


def _header_length(path: Path) -> int:
    with open(path, "rb") as file:
        npy.read_magic(file)
        npy.read_array_header_1_0(file)
        return file.tell()


def _write_header(path: Path, rows: int, dimensions: int) -> None:
    with open(path, "rb+" if path.is_file() else "wb") as file:
        file.write(_header(rows, dimensions))


def _append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _as_csv(rows: Sequence[Mapping[str, str]], columns: Sequence[str], *, header: bool = False) -> str:
    """Cells are one line each, so that lines are rows."""
    written = io.StringIO(newline="")
    writer = csv.writer(written, lineterminator="\n")
    if header:
        writer.writerow(columns)
    writer.writerows([re.sub(r"[\r\n]+", " ", str(row.get(name, ""))) for name in columns] for row in rows)
    return written.getvalue()


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Complete rows; a last one that was cut off is none."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise _damaged(path) from error
    lines = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(lines, newline="")))


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is missing or holds less than {INDEX_FILE} beside it says.",
        f"Restore the folder {path.parent}, or delete it and embed again.",
    )
