"""Class labels of a raw dataset: ``classification.csv`` and the ``classification`` block of ``dataset.json``.

``classification.csv`` has the columns ``case,subject,TARGET[,TARGET…]`` and one row per case. A cell holds the name of
a class; in a multi-label target the names separated by ``;``, or ``none``. An empty cell, ``NA``, ``nan`` and the like
(:data:`MISSING`) are no label. A case without a subject is its own. Cases of the dataset that have no row are not used
for classification.
"""

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.dataset_json import read_dataset_file

LABELS_FILE = "classification.csv"
BLOCK = "classification"
BINARY, MULTICLASS, MULTILABEL, ORDINAL = "binary", "multiclass", "multilabel", "ordinal"
KINDS = (BINARY, MULTICLASS, MULTILABEL, ORDINAL)
SEPARATOR = ";"
"""Between the classes of a multi-label cell."""
NONE = "none"
"""A multi-label cell without any class."""
MISSING = frozenset(("", "na", "n/a", "#n/a", "n.a.", "<na>", "nan", "none", "null", "missing"))
"""What people and programs write where there is no value, without regard to case."""

Label = int | tuple[int, ...]
"""Index of the class; in a multi-label target the sorted indices of the classes, possibly none."""

_OTHER_COLUMNS = ("case", "subject", "target", "label", "predicted")  # of this file and of predictions.csv


@dataclass(frozen=True)
class Target:
    """What is to be predicted.

    Raises:
        UserError: the kind, the name or the classes cannot be used.
    """

    name: str
    kind: str  # one of KINDS
    classes: tuple[str, ...]  # ordinal: lowest first; binary: the second is the positive one

    def __post_init__(self):
        if self.name in _OTHER_COLUMNS or not re.fullmatch(r"\w[\w .+-]*", self.name):
            raise UserError(f"A target cannot be named {self.name!r}.", "Use letters, digits, blanks and . _ + - only.")
        if self.kind not in KINDS:
            raise UserError(f"Target {self.name}: kind {self.kind!r}.", f"Use one of {', '.join(KINDS)}.")
        if len(self.classes) < 2:
            raise UserError(
                f"Target {self.name} has one class only: {', '.join(self.classes) or 'none at all'}.",
                "Give the cases of the other classes too, or leave the target out.",
            )
        if len(set(self.classes)) < len(self.classes) or not all(name.strip() for name in self.classes):
            raise UserError(f"Target {self.name}: classes {list(self.classes)}.", "Name each class once, none empty.")
        if self.kind == BINARY and len(self.classes) != 2:
            raise UserError(
                f"Target {self.name} is binary but has the classes {', '.join(self.classes)}.",
                f"--target {self.name}:{MULTICLASS}, or name its two classes.",
            )
        bad = [name for name in self.classes if SEPARATOR in name or name == NONE]
        if self.kind == MULTILABEL and bad:
            raise UserError(f"Target {self.name}: a class of a multi-label target is named {bad[0]!r}.", "Rename it.")

    @property
    def outputs(self) -> int:
        """Logits: K for multi-class (binary: 2) and multi-label, K − 1 conditional ones for ordinal."""
        return len(self.classes) - (self.kind == ORDINAL)

    def is_missing(self, cell: str) -> bool:
        """Whether a cell holds no label: nothing, or a word of :data:`MISSING` that is no class of this target."""
        if self.kind == MULTILABEL and cell == NONE:
            return False
        return is_missing(cell) and cell not in self.classes

    def parse(self, cell: str) -> Label:
        """The label that a cell stands for.

        Raises:
            ValueError: the cell names no class of this target; the message names the part that does not.
        """
        names = [cell]
        if self.kind == MULTILABEL:
            names = [] if cell == NONE else [name.strip() for name in cell.split(SEPARATOR) if name.strip()]
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise ValueError(unknown[0])
        indices = tuple(sorted({self.classes.index(name) for name in names}))
        return indices if self.kind == MULTILABEL else indices[0]

    def cell(self, label: Label) -> str:
        """The text of a label; :meth:`parse` reverses it."""
        if self.kind != MULTILABEL:
            return self.classes[label]
        return SEPARATOR.join(self.classes[index] for index in label) or NONE


def is_missing(cell: str) -> bool:
    """Whether a cell of a table stands for no value."""
    return cell.strip().casefold() in MISSING


@dataclass(frozen=True)
class ClassLabels:
    """The labelled cases of a dataset."""

    targets: tuple[Target, ...]
    subjects: dict[str, str]  # case → subject
    labels: dict[str, dict[str, Label]] = field(repr=False)  # target → case → label

    @property
    def cases(self) -> tuple[str, ...]:
        """Every labelled case, sorted."""
        return tuple(sorted(self.subjects))

    def target(self, name: str) -> Target:
        """The target of a name.

        Raises:
            UserError: there is none, naming those that there are.
        """
        for target in self.targets:
            if target.name == name:
                return target
        raise UserError(
            f"There is no target {name!r}; there are: {', '.join(t.name for t in self.targets)}.",
            "Name one of them, or add a column and its labels: nnssl_plugin prepare --class-labels",
        )

    def cases_of_class(self, target: Target, index: int) -> list[str]:
        """The cases that have a class."""
        labels = self.labels[target.name]
        if target.kind == MULTILABEL:
            return [case for case in self.cases if index in labels[case]]
        return [case for case in self.cases if labels[case] == index]


def read_class_labels(folder: Path, *, cases: Collection[str] | None = None) -> ClassLabels:
    """Read and check the class labels of a raw dataset.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``.
        cases: those that will be used, each of which must have a row; None: all that have one.

    Raises:
        UserError: ``classification.csv`` or the block of ``dataset.json`` is absent or damaged, a case has no row or
            two, a label is missing or no class of its target, or all cases have the same label.
    """
    folder = Path(folder)
    path = folder / LABELS_FILE
    targets = read_targets(folder)
    rows = read_table(path)
    absent = [target.name for target in targets if target.name not in (rows[0] if rows else ())]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}, which dataset.json names as a target.", _again(folder))
    return parse_labels(rows, targets, where=path, cases=cases)


def read_targets(folder: Path) -> tuple[Target, ...]:
    """The targets that ``dataset.json`` of a raw dataset names.

    Raises:
        UserError: there is no such file, or it has no (usable) ``classification`` block.
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise UserError(f"There is no {path}.", "Prepare the dataset first: nnssl_plugin prepare -i DIR -d ID -n NAME")
    block = read_dataset_file(path).get(BLOCK)
    if block is None:
        raise UserError(f"{path} has no {BLOCK!r} block: the dataset has no class labels.", _again(folder))
    try:
        return targets_from_block(block)
    except UserError as error:
        raise UserError(f"{path}, {BLOCK!r} block: {error.problem}", _again(folder)) from error


def targets_from_block(block: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets of a ``classification`` block, ``{"targets": {NAME: {"kind": …, "classes": […]}}}``.

    Raises:
        UserError: it does not look like that, or a target cannot be used.
    """
    try:
        found = tuple(
            Target(name, entry["kind"], tuple(map(str, entry["classes"]))) for name, entry in block["targets"].items()
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{type(error).__name__}: {error}.", 'It reads {"targets": {NAME: {"kind": KIND, "classes": [NAMES]}}}.'
        ) from error
    if not found:
        raise UserError("It names no target.", 'It reads {"targets": {NAME: {"kind": KIND, "classes": [NAMES]}}}.')
    return found


def targets_block(targets: Sequence[Target]) -> dict[str, Any]:
    """The ``classification`` block of targets; :func:`targets_from_block` reverses it."""
    return {"targets": {target.name: {"kind": target.kind, "classes": list(target.classes)} for target in targets}}


def write_class_labels(folder: Path, labels: ClassLabels) -> Path:
    """Write ``classification.csv`` and the block of ``dataset.json`` of a raw dataset; return the path of the table."""
    folder = Path(folder)
    path = folder / LABELS_FILE
    names = [target.name for target in labels.targets]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["case", "subject", *names])
        for case in labels.cases:
            cells = [target.cell(labels.labels[target.name][case]) for target in labels.targets]
            writer.writerow([case, labels.subjects[case], *cells])
    description = folder / "dataset.json"
    write_json(description, {**read_dataset_file(description), BLOCK: targets_block(labels.targets)})
    return path


def parse_labels(
    rows: Sequence[Mapping[str, str]], targets: Sequence[Target], *, where: Path, cases: Collection[str] | None = None
) -> ClassLabels:
    """Labels from the rows of a table (:func:`read_table`).

    Args:
        rows: with a column per target.
        targets: what to read.
        where: the file, for messages.
        cases: those that are wanted; None: every row.

    Raises:
        UserError: a case has no row or two, a label is missing or unknown, or all cases have the same label.
    """
    subjects = {}
    for row in rows:
        if row["case"] in subjects:
            raise UserError(f"{where}: case {row['case']!r} occurs twice.", "Keep one row per case.")
        subjects[row["case"]] = subject_of(row)
    wanted = set(subjects) if cases is None else set(cases)
    without = sorted(wanted - set(subjects))
    if without:
        raise UserError(f"{where} has no row for {some(without)}.", "Add the rows, or leave the cases out.")
    used = [row for row in rows if row["case"] in wanted]
    labels = {target.name: _column(used, target, where) for target in targets}
    return ClassLabels(tuple(targets), {case: s for case, s in subjects.items() if case in wanted}, labels)


def subject_of(row: Mapping[str, str]) -> str:
    """The subject of a row; its case where the cell is absent or holds no value."""
    subject = row.get("subject", "")
    return row["case"] if is_missing(subject) else subject


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table with a ``case`` column, as stripped text.

    Lines end where the csv module says so: U+2028 and U+0085, for example, may stand in a cell. Comma,
    semicolon or tab separate the cells (whichever the header line has most of, as Excel writes them in its language); a
    byte order mark is skipped; blank lines are left out.

    Raises:
        UserError: the file is absent, empty or not UTF-8, its header has no ``case`` column or a name twice, or a
            line has more or fewer cells than the header, or no case.
    """
    path = Path(path)
    text = _text(path)
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    separator = max((",", ";", "\t"), key=header.count)
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator)
    try:
        return _rows(reader, header, separator, path)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}.", "Save the table anew as CSV.") from error


def _rows(reader, header: str, separator: str, path: Path) -> list[dict[str, str]]:
    names = [name.strip() for name in next(reader, [])]
    if "case" not in names:
        raise UserError(
            f"{path} has no column 'case' in its first line: {header.strip()[:80]!r}.",
            "The header reads case,subject,TARGET (subject may be left out).",
        )
    twice = [name for number, name in enumerate(names) if name in names[:number] or not name]
    if twice:
        raise UserError(f"{path}: the header names {twice[0]!r} twice or leaves a column unnamed.", "Name each once.")
    rows = []
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if len(cells) != len(names):
            raise UserError(
                f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(names)}.",
                f'Put a cell that holds {separator!r} in quotation marks: "a{separator}b".',
            )
        rows.append(dict(zip(names, cells, strict=True)))
        if not rows[-1]["case"]:
            raise UserError(f"{path}, line {reader.line_num}: no case.", "Name the case, or delete the line.")
    if not rows:
        raise UserError(f"{path} holds no rows.", "Add a line per case below the header.")
    return rows


def _column(rows: Sequence[Mapping[str, str]], target: Target, where: Path) -> dict[str, Label]:
    missing = [row["case"] for row in rows if target.is_missing(row[target.name])]
    if missing:
        hint = f" (a case without any class reads {NONE})" if target.kind == MULTILABEL else ""
        raise UserError(
            f"{where}: no {target.name} for {some(missing)}.",
            f"Fill in the label{hint}, or delete the row: then the case is not used.",
        )
    found = {}
    for row in rows:
        try:
            found[row["case"]] = target.parse(row[target.name])
        except ValueError as error:
            raise UserError(
                f"{where}: {target.name} of case {row['case']} is {error}, which is no class of it "
                f"({', '.join(target.classes)}).",
                f"Correct the cell, or give the classes anew: --target {target.name}:{target.kind}:CLASS,CLASS",
            ) from error
    if len(set(found.values())) < 2:
        present = target.cell(next(iter(found.values()))) if found else "no case"
        raise UserError(
            f"{where}: {target.name} has one class only among {len(found)} cases: {present}.",
            "Give cases of another class too, or leave the target out.",
        )
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"There is no {path}.", "Give the class labels: nnssl_plugin prepare --class-labels FILE.csv")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}).", "In Excel: Save As, file type 'CSV UTF-8'."
        ) from error


def _again(folder: Path) -> str:
    number = re.match(r"Dataset(\d+)", Path(folder).name)
    return f"Run: nnssl_plugin prepare --class-labels FILE.csv -d {int(number[1]) if number else 'ID'}"
