"""Class labels for a raw dataset: one made from scans and a table, or one that is there already."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.bids import PARTICIPANTS, read_participants
from nnssl_plugin.intake.file_search import find_scans
from nnssl_plugin.intake.label_tables import Row, infer_targets, match_cases, match_scans
from nnssl_plugin.intake.ledger import PROVENANCE_FILE, Origin, read_rows
from nnssl_plugin.intake.preview import Preview
from nnssl_plugin.intake.unlabelled import PrepareSummary, prepare_dataset
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import BINARY, ClassLabels, Target, parse_labels, read_table, write_class_labels
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder, training_files

FOLDS = 5
"""Of cross-validation, for the warning about rare classes."""


@dataclass(frozen=True)
class LabelSummary:
    """What was written about the classes of a dataset."""

    path: Path  # of classification.csv
    labels: ClassLabels
    unlabelled: tuple[str, ...]  # cases of the dataset that have no row, and are not used for classification
    dropped: tuple[str, ...] = ()  # rows whose scan was refused
    left_out: int = 0  # scans without a row


def prepare_class_dataset(
    source: str | Path,
    dataset_id: int,
    name: str,
    *,
    table: str | Path,
    targets: Sequence[str] = (),
    modality: str | None = None,
    processes: int = 2,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    announce: Callable[[Preview], None] | None = None,
) -> tuple[PrepareSummary, LabelSummary]:
    """Make or extend a raw dataset from the scans that a table names, with their class labels.

    Everything about the table is checked before the first scan is read. Scans without a row are left out; scans that
    are refused (``rejected.csv``) lose their row. What a row names is never set aside, whatever it looks like.

    Args:
        source: folder of the scans or 2D images.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        table: csv with the columns ``case`` (:func:`match_scans`), ``subject`` (may be absent) and the targets; or
            ``participants.tsv`` of a BIDS dataset.
        targets: see :func:`infer_targets`.
        modality: see :func:`~nnssl_plugin.intake.unlabelled.prepare_dataset`.
        processes: worker processes.
        include: patterns of scans to take, see :func:`~nnssl_plugin.intake.file_search.matches`; none: all.
        exclude: patterns of scans to leave out, masks in a folder that a row names for example.
        announce: is told what lies ahead before the first scan is read.

    Raises:
        UserError: the table cannot be used, or the dataset not be made.
    """
    source, table = Path(source).absolute(), Path(table)
    if table.name == PARTICIPANTS:
        scans = find_scans(source, include=include, exclude=exclude).scans
        rows = read_participants(table, scans, source=source)
        wanted = _checked_targets(rows, targets, table)
    else:
        rows = read_table(table)
        wanted = _checked_targets(rows, targets, table)
        scans = find_scans(source, include=include, exclude=exclude).scans
    by_scan = match_scans(rows, scans, source=source, where=table)
    summary = prepare_dataset(
        source,
        dataset_id,
        name,
        modality=modality,
        processes=processes,
        only=by_scan,
        include=include,
        exclude=exclude,
        announce=announce,
    )
    cases = {row.source: row.case for row in read_rows(summary.folder / PROVENANCE_FILE, Origin)}
    taken = {scan: row for scan, row in by_scan.items() if str(scan) in cases}
    named = [{**row, "case": cases[str(scan)]} for scan, row in taken.items()]
    dropped = [row["case"] for scan, row in by_scan.items() if scan not in taken]
    if not named:
        raise UserError(
            f"Every scan that {table} names was refused: {some(dropped)}.",
            f"The reasons: {summary.folder / 'rejected.csv'}",
        )
    labelled = _write(summary.folder, named, wanted, table, cases=list(cases.values()))
    return summary, replace(labelled, dropped=tuple(dropped), left_out=len(scans) - len(by_scan))


def label_dataset(dataset: str | int, *, table: str | Path, targets: Sequence[str] = ()) -> LabelSummary:
    """Add class labels to a raw dataset that is there, a segmentation dataset for example.

    Args:
        dataset: ID or full name.
        table: csv whose ``case`` column holds names of cases (or of their files).
        targets: see :func:`infer_targets`.

    Raises:
        UserError: there is no such dataset, or the table cannot be used.
    """
    folder, table = raw_dataset_folder(dataset), Path(table)
    rows = read_table(table)
    wanted = _checked_targets(rows, targets, table)
    cases = list(training_files(folder))
    named = match_cases(
        rows,
        cases,
        ending=read_dataset_file(folder / "dataset.json", needed=("file_ending",))["file_ending"],
        where=table,
    )
    return _write(folder, named, wanted, table, cases=cases)


def describe(labels: ClassLabels) -> list[str]:
    """One line per target, and one per class with its cases and subjects."""
    lines = []
    for target in labels.targets:
        positive = f", positive: {target.classes[1]}" if target.kind == BINARY else ""
        lines.append(f"{target.name} ({target.kind}{positive}):")
        width = max(len(name) for name in target.classes)
        for index, name in enumerate(target.classes):
            cases = labels.cases_of_class(target, index)
            lines.append(f"  {name:<{width}}  {len(cases):>5} cases of {_subjects(labels, cases):>5} subjects")
    return lines


def warn_of_rare_classes(labels: ClassLabels, *, folds: int = FOLDS) -> list[str]:
    """A sentence for every class with fewer subjects than folds: some folds then lack it."""
    return [
        f"{target.name}: class {name} has {count} subjects, fewer than {folds} folds; some will lack it."
        for target in labels.targets
        for index, name in enumerate(target.classes)
        if (count := _subjects(labels, labels.cases_of_class(target, index))) < folds
    ]


def warn_of_similar_classes(labels: ClassLabels) -> list[str]:
    """A sentence for classes whose names differ in case, blanks or signs alone: they are likely one class."""
    found = []
    for target in labels.targets:
        alike = defaultdict(list)
        for name in target.classes:
            alike[re.sub(r"[\W_]+", "", name.casefold()) or name].append(name)
        found += [
            f"{target.name}: {' and '.join(names)} are taken for different classes; write them alike if they are one."
            for names in alike.values()
            if len(names) > 1
        ]
    return found


def _checked_targets(rows: list[Row], specs: Sequence[str], table: Path) -> tuple[Target, ...]:
    targets = infer_targets(rows, specs, where=table)
    parse_labels(rows, targets, where=table)
    return targets


def _write(
    folder: Path, rows: list[Row], targets: tuple[Target, ...], table: Path, *, cases: list[str]
) -> LabelSummary:
    labels = parse_labels(rows, targets, where=table)
    path = write_class_labels(folder, labels)
    unlabelled = tuple(sorted(set(cases) - set(labels.subjects)))
    return LabelSummary(path, labels, unlabelled)


def _subjects(labels: ClassLabels, cases: Sequence[str]) -> int:
    return len({labels.subjects[case] for case in cases})
