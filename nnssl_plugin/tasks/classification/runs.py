"""Where a classifier's predictions lie, and what they predict."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import BLOCK, Label, Target, read_table, subject_of, targets_from_block
from nnssl_plugin.tasks.classification.checkpoints import BEST, FINAL, VALIDATION, checkpoint_name
from nnssl_plugin.tasks.classification.predictions import Predictions, name_suffix, read_predictions


def find_tables(place: str | Path, *, checkpoint: str = FINAL) -> list[Path]:
    """The tables of a run.

    Args:
        place: a table; what ``classify -o`` was given; or a folder with ``predictions*.csv`` (``fold_X``,
            ``fold_X/validation``, ``crossval_results_…``).
        checkpoint: ``final`` or ``best``, whose validation of a ``fold_X``.

    Raises:
        UserError: there is none.
    """
    place = Path(place)
    if place.is_file():
        return [place]
    validation = place / VALIDATION[checkpoint]
    folder = validation if validation.is_dir() else place
    tables = sorted(folder.glob("predictions*.csv")) or sorted(place.parent.glob(f"{place.stem}_*{place.suffix}"))
    if not tables or (not place.is_dir() and not place.suffix):
        raise UserError(
            f"{place} is no table of predictions, and no folder with predictions.csv.",
            "Name fold_X/validation, crossval_results_folds_…, or what classify -o wrote.",
        )
    return tables


def targets_of(place: str | Path, *, dataset_json: str | Path | None = None) -> tuple[Target, ...]:
    """The targets of a run, from the nearest description.

    Args:
        place: a table (``classify`` writes a ``.json`` of the same name beside it), or a folder in or above which a
            ``dataset.json`` lies.
        dataset_json: names it instead.

    Raises:
        UserError: there is none with a ``classification`` block.
    """
    place = Path(place).absolute()
    near = (
        [Path(dataset_json)]
        if dataset_json
        else [place.with_suffix(".json"), *(folder / "dataset.json" for folder in (place, *list(place.parents)[:3]))]
    )
    for path in near:
        block = _block(path)
        if block is not None:
            return targets_from_block(block)
    raise UserError(
        f"No dataset.json with a '{BLOCK}' block was found for {place}, so its classes are unknown.",
        "Name it: -djfile nnUNet_raw/DatasetXXX_NAME/dataset.json",
    )


def read_tables(
    tables: Sequence[Path],
    targets: Sequence[Target],
    *,
    references: Mapping[str, Mapping[str, tuple[str, Label]]] | None = None,
) -> dict[str, Predictions]:
    """Target → predictions of the tables of one run.

    Args:
        tables: one per target.
        targets: that are known.
        references: target → case → (subject, label), instead of the tables' own.

    Raises:
        UserError: a table is malformed, or predicts an unknown target.
    """
    known = {target.name: target for target in targets}
    found = {}
    for path in tables:
        row = read_table(path)[0]
        name = row.get("target") or (targets[0].name if len(targets) == 1 else "")
        if name not in known:
            raise UserError(
                f"{path} predicts '{name}', which is no target ({', '.join(known)}).",
                "Name the dataset.json that defines it with -djfile.",
            )
        if references is not None and name not in references:
            raise UserError(
                f"The table of labels has no column {name!r}, which {path} predicts.",
                f"Add it, or name tables of {', '.join(references)} only.",
            )
        table = read_predictions(path, known[name], references=references and references[name])
        found[name] = replace(table, checkpoint=table.checkpoint or _checkpoint_of(path, known[name]))
    return found


def read_references(path: str | Path, targets: Sequence[Target]) -> dict[str, dict[str, tuple[str, Label]]]:
    """Target → case → (subject, label) of a table ``case,subject,TARGET…``; targets without a column and cells
    without a label are left out.

    A test set may hold one class only, which ``classification.csv`` of a training may not.

    Raises:
        UserError: the table is malformed, a case occurs twice, it has no column of a target, or a cell names no
            class.
    """
    path = Path(path)
    rows = read_table(path)
    twice = sorted(case for case, count in Counter(row["case"] for row in rows).items() if count > 1)
    if twice:
        raise UserError(f"{path}: cases occur more than once: {some(twice)}.", "Keep one row per case.")
    found: dict[str, dict[str, tuple[str, Label]]] = {}
    for target in targets:
        if target.name not in rows[0]:
            continue
        try:
            found[target.name] = {
                row["case"]: (subject_of(row), target.parse(row[target.name]))
                for row in rows
                if not target.is_missing(row[target.name])
            }
        except ValueError as error:
            raise UserError(
                f"{path}: {str(error)!r} is no class of {target.name} ({', '.join(target.classes)}).",
                "Correct the cell.",
            ) from error
    if not found:
        raise UserError(
            f"{path} has no column {', '.join(target.name for target in targets)}.",
            "Its header reads case,subject,TARGET.",
        )
    return found


def _checkpoint_of(table: Path, target: Target) -> str:
    """``final`` or ``best`` where the table does not say: ``classify`` notes its checkpoint in a file beside it, and
    earlier versions validated folds with the best one. Empty where it is not known."""
    for stem in (table.stem, table.stem.removesuffix(name_suffix(target, (target, target)))):
        record = table.with_name(f"{stem}.json")
        if record.is_file():
            return checkpoint_name(str(read_json(record, dict).get("checkpoint", "")))
    in_fold = table.parent.name == VALIDATION[FINAL] and table.parent.parent.name.startswith("fold_")
    return BEST if in_fold and "checkpoint" not in read_table(table)[0] else ""


def _block(path: Path) -> Any:
    if path.suffix != ".json" or not path.is_file():
        return None
    content = read_json(path)
    return content.get(BLOCK) if isinstance(content, dict) else None
