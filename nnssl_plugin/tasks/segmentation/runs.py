"""What is evaluated: the prediction files of a run, and the references and labels that they are held against."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.plans import dataset_folder

Label = int | tuple[int, ...]
"""A label, or the labels that a region unites."""


@dataclass(frozen=True)
class Standard:
    """What predictions are held against."""

    folder: Path  # of the references
    ending: str
    labels: dict[str, Label]  # name → label or region, without background
    ignore_label: int | None
    reader: type  # nnU-Net's reader of the dataset


@dataclass(frozen=True)
class Run:
    """Predictions that are evaluated under one name."""

    name: str
    predictions: dict[str, Path]  # case → file
    missing: tuple[str, ...]  # cases that should have been predicted


@dataclass(frozen=True)
class Source:
    """Where a run's predictions lie."""

    folders: tuple[Path, ...]
    home: Path  # where dataset.json and plans.json are looked for
    folds: tuple[int, ...]  # empty where the predictions are no validation of a fold


def find_source(folder: str | Path, *, folds: Sequence[int] | None = None) -> Source:
    """Where the predictions of a run lie.

    Args:
        folder: predictions, ``fold_X``, ``fold_X/validation``, or ``TRAINER__PLANS__CONFIG``.
        folds: those to pool of a ``TRAINER__PLANS__CONFIG`` folder; None: all that are numbered.

    Raises:
        UserError: there is no such folder, or a fold has no validation.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", "Name it as -i NAME=DIR.")
    if (folder / "validation").is_dir():
        folder = folder / "validation"
    fold = re.fullmatch(r"fold_(\d+)", folder.parent.name)
    if folder.name == "validation" and fold:
        return Source((folder,), folder.parent.parent, (int(fold[1]),))
    present = [int(p.name[5:]) for p in folder.glob("fold_*") if p.name[5:].isdigit()]
    if not present:
        return Source((folder,), folder, ())
    wanted = tuple(sorted(present if folds is None else folds))
    validations = tuple(folder / f"fold_{number}" / "validation" for number in wanted)
    for validation in validations:
        if not validation.is_dir():
            raise UserError(
                f"There is no folder {validation}.",
                "Finish it with nnUNetv2_train … --val, or name other folds with -f.",
            )
    return Source(validations, folder, wanted)


def find_standard(
    source: Source, *, references: str | Path | None = None, dataset_json: str | Path | None = None
) -> Standard:
    """The references and labels of a run: given, or found where nnU-Net's own validation finds them.

    Args:
        source: of the run.
        references: folder of the reference segmentations; None: ``gt_segmentations`` of the preprocessed dataset.
        dataset_json: None: beside the results or the predictions, or above the references.

    Raises:
        UserError: something is neither given nor found.
    """
    plans = _read_if_there(source.home / "plans.json")
    if references is None and not (source.folds and plans):
        raise UserError(
            f"{source.home} is no nnU-Net result folder with a plans.json, so its references are unknown.",
            "Name their folder with -ref, for example: -ref nnUNet_raw/DatasetXXX_NAME/labelsTs",
        )
    folder = Path(references) if references else dataset_folder(plans["dataset_name"]) / "gt_segmentations"
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} of references.", "Name it with -ref.")
    described = _dataset_json(source, folder, dataset_json)
    ending = described["file_ending"]
    if not files_by_case(folder, ending):
        raise UserError(f"{folder} holds no {ending} file.", "Name the folder of the references with -ref.")
    labels, ignored = _labels(described)
    return Standard(folder, ending, labels, ignored, _reader(plans, described, folder, ending))


def check_same_labels(sources: Mapping[str, Source], standard: Standard) -> None:
    """Refuse runs whose own ``dataset.json`` defines other labels than the standard.

    Raises:
        UserError: naming the run.
    """
    for name, source in sources.items():
        described = _read_if_there(source.home / "dataset.json")
        if described is not None and _labels(described) != (standard.labels, standard.ignore_label):
            raise UserError(
                f"{name}: {source.home / 'dataset.json'} defines other labels than are evaluated: "
                f"{', '.join(standard.labels)}.",
                "Compare runs of one dataset, or name the definition that holds for all with -djfile.",
            )


def find_run(name: str, source: Source, standard: Standard) -> Run:
    """The prediction files of a run.

    Raises:
        UserError: there is none, a case occurs twice, or predictions have no reference.
    """
    predictions: dict[str, Path] = {}
    for folder in source.folders:
        for case, path in files_by_case(folder, standard.ending).items():
            if case in predictions:
                raise UserError(
                    f"{name}: case {case} is in {predictions[case].parent} and in {folder}.",
                    "Pool folds that share no case, for example: -f 0 1 2 3 4",
                )
            predictions[case] = path
    if not predictions:
        raise UserError(f"{name}: no {standard.ending} file in {source.folders[0]}.", "Name the folder of predictions.")
    referenced = files_by_case(standard.folder, standard.ending)
    stray = sorted(set(predictions) - set(referenced))
    if stray:
        raise UserError(
            f"{name}: {len(stray)} predictions have no reference in {standard.folder}: {some(stray)}.",
            "Name the folder of their references with -ref.",
        )
    missing = _expected(source, standard, referenced) - set(predictions)
    return Run(name, dict(sorted(predictions.items())), tuple(sorted(missing)))


def files_by_case(folder: Path, ending: str) -> dict[str, Path]:
    """Case → file of a folder."""
    return {p.name[: -len(ending)]: p for p in sorted(folder.glob(f"*{ending}")) if not p.name.startswith(".")}


def some(names: Sequence[str], *, shown: int = 5) -> str:
    """The first names of many, for a message."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _expected(source: Source, standard: Standard, referenced: Mapping[str, Path]) -> set[str]:
    """A fold is to predict its validation cases; other folders every case that has a reference."""
    if not source.folds:
        return set(referenced)
    splits = _read_if_there(standard.folder.parent / "splits_final.json") or []
    return {case for fold in source.folds if fold < len(splits) for case in splits[fold]["val"]} & set(referenced)


def _labels(described: Mapping[str, Any]) -> tuple[dict[str, Label], int | None]:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(described["labels"], described.get("regions_class_order"))
    kept = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    labels: dict[str, Label] = {}
    for name, value in described["labels"].items():
        values = tuple(value) if isinstance(value, list | tuple) else value
        if not manager.has_regions and isinstance(values, tuple):
            (values,) = values
        if values in kept and name != "ignore":
            labels[name] = values if isinstance(values, tuple) else int(values)
    return labels, manager.ignore_label


def _reader(plans: Mapping[str, Any] | None, described: Mapping[str, Any], folder: Path, ending: str) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json as from_dataset
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    if plans:
        return PlansManager(dict(plans)).image_reader_writer_class
    example = next(iter(files_by_case(folder, ending).values()))
    return from_dataset(dict(described), str(example), verbose=False)


def _dataset_json(source: Source, references: Path, given: str | Path | None) -> dict[str, Any]:
    places = [Path(given)] if given else [source.home / "dataset.json", references.parent / "dataset.json"]
    for path in places:
        content = _read_if_there(path)
        if content is not None:
            return content
    raise UserError(
        f"There is no {' and no '.join(map(str, places))}.",
        "Name the dataset.json that defines the labels with -djfile.",
    )


def _read_if_there(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.", "Restore it.") from error
