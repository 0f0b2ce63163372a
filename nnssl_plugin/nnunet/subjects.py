"""Which cases belong to one subject, from a table with the columns ``case,subject``."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import LABELS_FILE, read_table, subject_of

SUBJECTS_FILE = "subjects.csv"
"""Of a raw dataset: case and subject, to be given as ``--subjects``."""


def write_subjects(folder: Path, subjects: Mapping[str, str]) -> None:
    """Write ``subjects.csv`` of a raw dataset: which cases are of one subject."""
    lines = ["case,subject", *(f"{case},{subjects[case]}" for case in sorted(subjects))]
    with atomic_path(folder / SUBJECTS_FILE) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_subjects(path: str | Path) -> dict[str, str]:
    """Case → subject of a table; a case with an empty cell is its own subject.

    Raises:
        UserError: the table cannot be read, has no column ``subject``, or gives a case two subjects.
    """
    rows = read_table(Path(path))
    if "subject" not in rows[0]:
        raise UserError(f"{path} has no column 'subject'.", "Its header reads case,subject.")
    subjects: dict[str, str] = {}
    for row in rows:
        subject = subject_of(row)
        if subjects.setdefault(row["case"], subject) != subject:
            raise UserError(
                f"{path} gives case {row['case']!r} the subjects {subjects[row['case']]!r} and {subject!r}.",
                "Keep one row per case.",
            )
    return subjects


def subjects_of_cases(cases: Iterable[str], *, table: str | Path | None, raw_folder: Path | None) -> dict[str, str]:
    """The subject of every case.

    Args:
        cases: names.
        table: see :func:`read_subjects`, which has to name every case; None: ``classification.csv`` of the raw
            dataset, where there is one with subjects.
        raw_folder: the raw dataset, or None. Without a table each case is its own subject, and so is a case that
            ``classification.csv`` does not name.

    Raises:
        UserError: the table cannot be read or lacks a case.
    """
    cases = list(cases)
    if table is None:
        return _own_subject_where_unknown(cases, _of_raw_dataset(raw_folder))
    named = read_subjects(table)
    without = [case for case in cases if case not in named]
    if without:
        raise UserError(f"{table} has no row for {some(without)}.", "Add the rows; a case alone is its own subject.")
    return {case: named[case] for case in cases}


def raw_folder_if_there(dataset_name: str) -> Path | None:
    """``nnUNet_raw/DatasetXXX_NAME``, or None where nnUNet_raw is not set or has no such folder."""
    root = os.environ.get("nnUNet_raw")
    folder = Path(root, dataset_name) if root else None
    return folder if folder is not None and folder.is_dir() else None


def _of_raw_dataset(raw_folder: Path | None) -> dict[str, str]:
    table = raw_folder / LABELS_FILE if raw_folder is not None else None
    if table is None or not table.is_file() or "subject" not in read_table(table)[0]:
        return {}
    return read_subjects(table)


def _own_subject_where_unknown(cases: Iterable[str], named: Mapping[str, str]) -> dict[str, str]:
    return {case: named.get(case, case) for case in cases}
