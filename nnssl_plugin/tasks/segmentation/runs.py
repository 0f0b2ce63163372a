"""The prediction files of a run, and the references and labels that they are scored against."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.plans import dataset_folder
from nnssl_plugin.nnunet.splits import SPLITS_FILE, read_splits
from nnssl_plugin.nnunet.subjects import raw_folder_if_there

Label = int | tuple[int, ...]
"""A label, or the labels that a region unites."""


@dataclass(frozen=True)
class References:
    """What predictions are scored against."""

    folder: Path  # of the references
    ending: str
    labels: dict[str, Label]  # name → label or region, without background
    ignore_label: int | None
    reader: type  # nnU-Net's reader of the dataset
    raw_folder: Path | None = None  # of the dataset, whose class labels may name subjects

    @property
    def known_values(self) -> frozenset[int]:
        """Every value that has a meaning, without background."""
        values = {v for label in self.labels.values() for v in (label if isinstance(label, tuple) else (label,))}
        return frozenset(values | ({self.ignore_label} if self.ignore_label is not None else set()))


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


def find_references(
    source: Source, *, references: str | Path | None = None, dataset_json: str | Path | None = None
) -> References:
    """The references and labels of a run: given, or found where nnU-Net's own validation finds them.

    Args:
        source: of the run.
        references: folder of the reference segmentations; None: ``gt_segmentations`` of the preprocessed dataset.
        dataset_json: None: beside the results or the predictions, or above the references.

    Raises:
        UserError: something is neither given nor found.
    """
    plans = _read_if_there(source.home / "plans.json")
    if plans is not None and not isinstance(plans.get("dataset_name"), str):
        raise UserError(f"{source.home / 'plans.json'} names no dataset.", "Restore the plans.json of the training.")
    if references is None and not (source.folds and plans):
        raise UserError(
            f"{source.home} is no nnU-Net result folder with a plans.json, so its references are unknown.",
            "Name their folder with -ref, for example: -ref nnUNet_raw/DatasetXXX_NAME/labelsTs",
        )
    folder = Path(references) if references else dataset_folder(plans["dataset_name"]) / "gt_segmentations"
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} of references.", "Name it with -ref.")
    path = _find_dataset_json(source, folder, dataset_json)
    described = read_dataset_file(path, needed=("labels", "file_ending"))
    ending = described["file_ending"]
    if not files_by_case(folder, ending):
        raise UserError(f"{folder} holds no {ending} file.", "Name the folder of the references with -ref.")
    labels, ignored = _labels(path)
    if not labels:
        raise UserError(f"{path} names no label besides the background.", "Name another dataset.json with -djfile.")
    raw = raw_folder_if_there(plans["dataset_name"]) if plans else folder.parent
    return References(folder, ending, labels, ignored, _reader(plans, described, folder, ending), raw)


def check_same_labels(sources: Mapping[str, Source], references: References) -> None:
    """Refuse runs whose own ``dataset.json`` defines other labels than the references.

    Raises:
        UserError: naming the run.
    """
    for name, source in sources.items():
        path = source.home / "dataset.json"
        if path.is_file() and _labels(path) != (references.labels, references.ignore_label):
            raise UserError(
                f"{name}: {path} defines other labels than are evaluated: {', '.join(references.labels)}.",
                "Compare runs of one dataset, or name the definition that holds for all with -djfile.",
            )


def find_run(name: str, source: Source, references: References) -> Run:
    """The prediction files of a run.

    Raises:
        UserError: there is none, a case occurs twice, or predictions have no reference.
    """
    predictions: dict[str, Path] = {}
    for folder in source.folders:
        for case, path in files_by_case(folder, references.ending).items():
            if case in predictions:
                raise UserError(
                    f"{name}: case {case} is in {predictions[case].parent} and in {folder}.",
                    "Pool folds that share no case, for example: -f 0 1 2 3 4",
                )
            predictions[case] = path
    if not predictions:
        raise UserError(
            f"{name}: no {references.ending} file in {source.folders[0]}.", "Name the folder of predictions."
        )
    referenced = files_by_case(references.folder, references.ending)
    stray = sorted(set(predictions) - set(referenced))
    if stray:
        raise UserError(
            f"{name}: {len(stray)} predictions have no reference in {references.folder}: {some(stray)}.",
            "Name the folder of their references with -ref.",
        )
    missing = _expected(source, references, referenced) - set(predictions)
    return Run(name, dict(sorted(predictions.items())), tuple(sorted(missing)))


def files_by_case(folder: Path, ending: str) -> dict[str, Path]:
    """Case → file of a folder."""
    return {p.name[: -len(ending)]: p for p in sorted(folder.glob(f"*{ending}")) if not p.name.startswith(".")}


def _expected(source: Source, references: References, referenced: Mapping[str, Path]) -> set[str]:
    """A fold is to predict its validation cases; other folders every case that has a reference."""
    if not source.folds:
        return set(referenced)
    path = references.folder.parent / SPLITS_FILE
    splits = read_splits(path) if path.is_file() else []
    return {case for fold in source.folds if fold < len(splits) for case in splits[fold]["val"]} & set(referenced)


def _labels(path: Path) -> tuple[dict[str, Label], int | None]:
    """Name → label or region as nnU-Net understands them, and the ignore label, of a ``dataset.json``.

    What nnU-Net asks for training alone (an order of regions, an ignore label above all others) is not needed here.
    """
    stated = read_dataset_file(path, needed=("labels",))["labels"]
    ignored = stated.get("ignore")
    values = {
        name: tuple(_whole(v, name, path) for v in (value if isinstance(value, list) else [value]))
        for name, value in stated.items()
    }
    named = {name: given for name, given in values.items() if name != "ignore" and any(given)}
    if ignored is not None:
        (ignored, *more) = values["ignore"]
        if more or ignored == 0 or any(ignored in given for given in named.values()):
            raise UserError(
                f"{path}: the ignore label is {stated['ignore']!r}, which is the background or another label too.",
                'It reads "ignore": NUMBER, a value that no other label has.',
            )
    regions = any(isinstance(stated[name], list) and len(given) > 1 for name, given in values.items())
    keep_lists = {name for name in named if regions and isinstance(stated[name], list)}
    return {name: given if name in keep_lists else given[0] for name, given in named.items()}, ignored


def _whole(value: Any, name: str, path: Path) -> int:
    """A label, also where it is written as text, which nnU-Net takes too."""
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value) or number < 0:
            raise ValueError(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: label {name!r} is {value!r}, no whole number from 0.",
            'It reads "labels": {"background": 0, "NAME": 1, "REGION": [1, 2]}.',
        ) from error
    return number


def _reader(plans: Mapping[str, Any] | None, described: Mapping[str, Any], folder: Path, ending: str) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json as from_dataset
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    example = next(iter(files_by_case(folder, ending).values()))
    try:
        if plans:
            return PlansManager(dict(plans)).image_reader_writer_class
        return from_dataset(dict(described), str(example), verbose=False)
    except (KeyError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"nnU-Net has no reader for {example}: {error}",
            "Check file_ending in dataset.json, and image_reader_writer in plans.json.",
        ) from error


def _find_dataset_json(source: Source, references: Path, given: str | Path | None) -> Path:
    places = [Path(given)] if given else [source.home / "dataset.json", references.parent / "dataset.json"]
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"There is no {' and no '.join(map(str, places))}.",
        "Name the dataset.json that defines the labels with -djfile.",
    )


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path, dict) if path.is_file() else None
