"""A table that grows by a row as each case is finished, and goes on after an interruption."""

import csv
import os
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.tasks.classification.predictions import cell, predicted_labels, probability_columns, shown_probability


class PredictionTable:
    """The table ``case,target,predicted,p_CLASS…`` of one target.

    Opening it repairs it: a last line that an interruption cut off is removed, so its case is done again.

    Args:
        path: the table; made where it is absent.
        target: what is predicted.

    Raises:
        UserError: the file holds another table.
    """

    def __init__(self, path: Path, target: Target):
        self.path, self.target = path, target
        self.columns = ["case", "target", "predicted", *probability_columns(target)]
        self.finished: set[str] = set()
        if path.is_file() and path.stat().st_size:
            self._reopen()

    def add(self, case: str, probabilities: np.ndarray) -> None:
        """Append the row of a case, probabilities (K,), and wait until it is on the disk."""
        predicted = predicted_labels(probabilities[None], self.target)[0]
        row = [case, self.target.name, cell(predicted, self.target), *map(shown_probability, probabilities)]
        new = not self.path.is_file() or not self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, [self.columns, row] if new else [row])))
            file.flush()
            os.fsync(file.fileno())
        self.finished.add(case)

    def _reopen(self) -> None:
        content = self.path.read_bytes()
        lines = BytesIO(content).readlines()
        if not lines[0].endswith(b"\n") and _line(self.columns).startswith(lines[0]):
            lines = []  # cut off within the header
        elif lines[0].rstrip(b"\r\n") != _line(self.columns).rstrip():
            raise UserError(f"{self.path} holds another table: {lines[0][:80]!r}.", "Name another file with -o.")
        whole = lines[: len(lines) - (bool(lines) and not self._is_row(lines[-1]))]
        for number, line in enumerate(whole[1:], start=2):
            if not self._is_row(line):
                raise UserError(
                    f"{self.path}, line {number}, is no row of this table: {line[:80]!r}.",
                    "Remove the line; its case is then classified again.",
                )
            self.finished.add(_cells(line)[0])
        if len(whole) < len(lines) or not lines:
            os.truncate(self.path, sum(map(len, whole)))

    def _is_row(self, line: bytes) -> bool:
        """Whether a line is the header, or a complete row."""
        if not line.endswith(b"\n") or b"\0" in line:
            return False
        cells = _cells(line)
        return len(cells) == len(self.columns) and (cells == self.columns or cells[1] == self.target.name)


def check_same_model(path: Path, description: dict[str, Any], *, tables: list[Path]) -> None:
    """Write what fills the tables beside them, or refuse to go on with those of another model.

    Args:
        path: the JSON file.
        description: the model, its folds and how it predicts.
        tables: of the targets.

    Raises:
        UserError: the tables were begun by another model or with other settings.
    """
    begun = [table for table in tables if table.is_file() and table.stat().st_size]
    if not begun:
        write_json(path, description)
        return
    if not path.is_file():
        raise UserError(
            f"{begun[0]} is there, but no {path.name} that says which model made it.", "Name another file with -o."
        )
    before = read_json(path, dict)
    different = sorted(key for key in {*before, *description} if before.get(key) != description.get(key))
    if different:
        raise UserError(
            f"{begun[0]} was begun with another {', '.join(different)}.",
            f"Name another file with -o, or begin again: rm {begun[0]}",
        )


def _line(cells: list[str]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8")


def _cells(line: bytes) -> list[str]:
    return next(csv.reader([line.decode("utf-8", errors="replace").rstrip("\r\n")]), [])
