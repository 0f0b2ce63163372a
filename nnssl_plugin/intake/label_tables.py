"""A table of class labels as people have it: which files its rows name, and what its columns are."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.tasks import name_without_ending
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import (
    BINARY,
    KINDS,
    MULTICLASS,
    MULTILABEL,
    NONE,
    ORDINAL,
    SEPARATOR,
    Target,
    is_missing,
    subject_of,
)

NEGATIVE = ("0", "no", "negative", "neg", "false", "absent", "normal", "healthy", "control", "benign")
"""Names that stand for the negative class of a binary target."""

Row = dict[str, str]


def infer_targets(rows: Sequence[Row], specs: Sequence[str], *, where: Path) -> tuple[Target, ...]:
    """The targets of a table.

    A kind that is not given is multi-label where a cell holds ``;``, binary where there are two classes, and
    multi-class otherwise; never ordinal. Classes that are not given are those that occur, numbers by value and names by
    alphabet; the negative class of a binary target (:data:`NEGATIVE`) comes first.

    Args:
        rows: of the table.
        specs: ``NAME``, ``NAME:KIND`` or ``NAME:KIND:CLASS,CLASS`` each; none: every column but ``case`` and
            ``subject``.
        where: the file, for messages.

    Raises:
        UserError: a column, kind or class order is missing, or a column looks like a measurement or a note.
    """
    columns = [name for name in rows[0] if name not in ("case", "subject")]
    parsed = [_parse_spec(spec) for spec in specs] or [(name, "", ()) for name in columns]
    if not parsed:
        raise UserError(f"{where} has no column of class labels.", "Its header reads case,subject,TARGET.")
    targets = []
    for name, kind, classes in parsed:
        if name not in columns:
            raise UserError(f"{where} has no column {name!r}; it has: {', '.join(columns)}.", "Name one with --target.")
        cells = [row[name] for row in rows if not is_missing(row[name])]
        kind = kind or _infer_kind(cells)
        targets.append(Target(name, kind, classes or _infer_classes(name, cells, kind, where=where)))
    return tuple(targets)


def match_scans(rows: Sequence[Row], scans: Iterable[Path], *, source: Path, where: Path) -> dict[Path, Row]:
    """Which row belongs to which scan.

    ``case`` names a file relative to ``source`` or by its absolute path, with or without its ending, or a folder,
    which stands for every scan in it; or a file's name alone where no other file has it. Scans of one row share a
    subject: the row's, or else its ``case``.

    Returns:
        scan to its row, with ``subject`` filled in where the row names several. Scans without a row are not in it.

    Raises:
        UserError: a row names no scan, or two rows the same one.
    """
    files, folders, names = _index(scans, source)
    found: dict[Path, Row] = {}
    unknown = []
    for row in rows:
        key = _relative(row["case"], source)
        matched = files[key] or folders[key] or (names[key] if len(names[key]) == 1 else [])
        if not matched:
            unknown.append(row["case"])
        for scan in matched:
            if scan in found:
                raise UserError(
                    f"{where}: {found[scan]['case']!r} and {row['case']!r} both name {scan}.", "Keep one row per scan."
                )
            found[scan] = {**row, "subject": subject_of(row)} if len(matched) > 1 else row
    if unknown:
        raise UserError(
            f"{where} names cases that are not below {source}: {some(unknown)}.",
            "Write each as a file or folder relative to the scans' folder, or delete the row.",
        )
    return found


def match_cases(rows: Sequence[Row], cases: Iterable[str], *, ending: str, where: Path) -> list[Row]:
    """Rows of a table whose ``case`` is a case of a dataset, or the name of its file, with ``case`` so named.

    Raises:
        UserError: a row names no case.
    """
    known = set(cases)
    renamed = [{**row, "case": _as_case(row["case"], known, ending)} for row in rows]
    unknown = [row["case"] for row, new in zip(rows, renamed, strict=True) if new["case"] not in known]
    if unknown:
        example = min(known, default="")
        raise UserError(
            f"{where} names cases that the dataset does not have: {some(unknown)}.",
            f"Its cases are named like {example!r}. Correct the rows, or delete them.",
        )
    return renamed


def _parse_spec(spec: str) -> tuple[str, str, tuple[str, ...]]:
    name, _, rest = spec.partition(":")
    kind, _, classes = rest.partition(":")
    if kind and kind not in KINDS:
        raise UserError(f"--target {spec}: kind {kind!r}.", f"Use one of {', '.join(KINDS)}.")
    return name, kind, tuple(part.strip() for part in classes.split(",")) if classes else ()


def _infer_kind(cells: Sequence[str]) -> str:
    if any(SEPARATOR in cell for cell in cells):
        return MULTILABEL
    return BINARY if len(set(cells)) == 2 else MULTICLASS


def _infer_classes(name: str, cells: Sequence[str], kind: str, *, where: Path) -> tuple[str, ...]:
    parts = cells
    if kind == MULTILABEL:
        parts = [part.strip() for cell in cells if cell != NONE for part in cell.split(SEPARATOR)]
    distinct = sorted(set(parts) - {""})
    if len(distinct) > max(2, len(cells) / 2):
        raise UserError(
            f"{where}: {name} has {len(distinct)} different values in {len(cells)} rows, too many for classes.",
            f"Name the columns that are targets: --target NAME; or the classes of this one: "
            f"--target {name}:{MULTICLASS}:CLASS,CLASS",
        )
    try:
        return tuple(sorted(distinct, key=float))
    except ValueError:
        if kind == ORDINAL:
            raise UserError(
                f"{where}: the order of the classes of {name} is not known: {', '.join(distinct)}.",
                f"Give it, lowest first: --target {name}:{ORDINAL}:{','.join(distinct)}",
            ) from None
    if kind == BINARY:
        distinct.sort(key=lambda cell: cell.casefold() not in NEGATIVE)
    return tuple(distinct)


def _relative(case: str, source: Path) -> str:
    """A case with / between its parts, relative to the source where it is an absolute path below it."""
    path = PurePosixPath(os.path.normpath(case.replace("\\", "/")))
    for folder in (source.absolute(), source.resolve()):
        if path.is_relative_to(folder.as_posix()):
            return path.relative_to(folder.as_posix()).as_posix()
    return path.as_posix()


def _index(scans: Iterable[Path], source: Path) -> tuple[Mapping[str, list[Path]], ...]:
    """Scans by relative path (with and without ending), by every folder above them, and by their name alone."""
    files, folders, names = defaultdict(list), defaultdict(list), defaultdict(list)
    for scan in scans:
        relative = scan.relative_to(source)
        stem = name_without_ending(relative)
        for key in {relative.as_posix(), stem}:
            files[key].append(scan)
        for key in {relative.name, PurePosixPath(stem).name}:
            names[key].append(scan)
        for folder in relative.parents[:-1]:
            folders[folder.as_posix()].append(scan)
    return files, folders, names


def _as_case(text: str, known: set[str], ending: str) -> str:
    name = PurePosixPath(text.replace("\\", "/")).name
    without = name.removesuffix(ending)
    return next((case for case in (text, without, without.removesuffix("_0000")) if case in known), text)
