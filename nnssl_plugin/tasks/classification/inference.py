"""A folder of images in, a table of probabilities out: one row per case as it is finished, and goes on where it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnssl_plugin.checkpoints.format.shared_folder import file_hash
from nnssl_plugin.data.images import Image, UnusableCase, find_images, read_image
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.case_labels import BLOCK, targets_block
from nnssl_plugin.tasks.classification.batches import FOREGROUND
from nnssl_plugin.tasks.classification.checkpoints import FINAL, checkpoint_file
from nnssl_plugin.tasks.classification.ensemble import Ensemble, find_trained_folds, load_ensemble
from nnssl_plugin.tasks.classification.prediction_table import PredictionTable, check_same_model
from nnssl_plugin.tasks.classification.predictions import name_suffix


@dataclass(frozen=True)
class Classified:
    """What was done."""

    tables: tuple[Path, ...]
    done: int  # cases classified now
    skipped: int  # cases that were in the tables
    failed: dict[str, str]  # case or file → why it was left out
    warnings: dict[str, tuple[str, ...]]  # case → what is odd about it


def classify_images(
    images: str | Path,
    output: str | Path,
    model_folder: str | Path,
    *,
    folds: Sequence[str | int] | None = None,
    checkpoint: str = FINAL,
    mirroring: bool = False,
    device: str = "cpu",
    segmentations: str | Path | None = None,
    explanations: str | Path | None = None,
    trust: bool = False,
) -> Classified:
    """Classify every image of a folder with the mean of the folds' probabilities.

    A case that cannot be read, or that training would have refused, is left out and named; the others go on. Running
    it again skips the cases that are in the table (and have their picture, where pictures are asked for).

    Args:
        images: with ``CASE_0000.nii.gz`` and so on, one file per channel.
        output: the table to write; with several targets ``_TARGET`` goes before its ending. What filled it is written
            to a ``.json`` of its name.
        model_folder: ``nnUNet_results/DATASET/PretrainedClassificationTrainer__PLANS__CONFIG``.
        folds: None: every numbered one that is trained.
        checkpoint: ``final``, ``best`` (on the validation cases of its fold), or a file of the folds' folders.
        mirroring: also show each image mirrored.
        device: ``cpu``, ``cuda`` or ``mps``.
        segmentations: folder with ``CASE.nii.gz``, for models that crop to the labels.
        explanations: folder for one picture per case and target of where the model looked.
        trust: build the model's network whatever its class.

    Raises:
        UserError: nothing can be classified, or the table is another model's.
    """
    output = Path(output)
    if output.suffix != ".csv":
        raise UserError(f"{output} is no name of a table.", f"For example: -o {output / 'predictions.csv'}")
    if explanations is not None:
        from nnssl_plugin.tasks.classification.explanation import check_monai

        check_monai()
    checkpoint = checkpoint_file(checkpoint)
    folds = list(folds) if folds else find_trained_folds(model_folder, checkpoint)
    ensemble = load_ensemble(
        model_folder, folds, checkpoint=checkpoint, mirroring=mirroring, device=device, trust=trust
    )
    if ensemble.first.settings.crop == FOREGROUND and segmentations is None:
        raise UserError(
            "This model looks at the box around the labels of a segmentation.",
            "Name the folder of the segmentations (CASE.nii.gz) with -seg; nnUNetv2_predict makes them.",
        )
    cases, failed = find_images(images, ensemble.first.dataset_json["file_ending"])
    tables = _open_tables(output, ensemble, _description(model_folder, folds, checkpoint, mirroring))
    pictures = {case: _pictures(explanations, case, ensemble) for case in cases}
    waiting = [
        case
        for case in cases
        if not all(case in table.finished for table in tables) or not all(path.is_file() for path in pictures[case])
    ]
    warnings = {}
    for case in tqdm(waiting, desc="classify", unit="case"):
        try:
            image = _read(case, cases[case], ensemble, segmentations)
            _predict(case, image, ensemble, tables, pictures[case])
            warnings[case] = image.warnings
        except UnusableCase as error:
            failed[case] = str(error)
    return Classified(
        tuple(table.path for table in tables),
        sum(case not in failed for case in waiting),
        len(cases) - len(waiting),
        failed,
        {case: said for case, said in warnings.items() if said},
    )


def _read(case: str, files: tuple[Path, ...], ensemble: Ensemble, segmentations: str | Path | None) -> Image:
    model = ensemble.first
    segmentation = None
    if segmentations is not None:
        segmentation = Path(segmentations) / f"{case}{model.dataset_json['file_ending']}"
        if not segmentation.is_file():
            raise UnusableCase(f"it has no segmentation {segmentation}")
    return read_image(
        files,
        plans=model.plans_manager,
        configuration=model.configuration_manager,
        dataset_json=model.dataset_json,
        segmentation=segmentation,
    )


def _predict(
    case: str, image: Image, ensemble: Ensemble, tables: Sequence[PredictionTable], pictures: Sequence[Path]
) -> None:
    """Draw what is missing, then add the rows: a case with a row is finished."""
    probabilities = {
        name: p[0].double().numpy()
        for name, p in ensemble.probabilities(ensemble.inputs(image.data, image.segmentation)[None]).items()
    }
    if not all(np.isfinite(p).all() for p in probabilities.values()):
        raise UnusableCase("the model gives NaN: was its training finished?")
    if not all(path.is_file() for path in pictures):
        from nnssl_plugin.tasks.classification.explanation import explain
        from nnssl_plugin.tasks.classification.explanation_figure import draw_explanation

        maps = explain(ensemble, image, probabilities)
        for target, path in zip(ensemble.targets, pictures, strict=True):
            with atomic_path(path) as temporary:
                draw_explanation(
                    temporary,
                    case,
                    image,
                    maps[target.name],
                    target=target,
                    probabilities=probabilities[target.name],
                    transpose_forward=ensemble.first.plans_manager.transpose_forward,
                )
    for table in tables:
        if case not in table.finished:
            table.add(case, probabilities[table.target.name])


def _open_tables(output: Path, ensemble: Ensemble, description: dict[str, Any]) -> list[PredictionTable]:
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = [output.with_stem(output.stem + name_suffix(target, ensemble.targets)) for target in ensemble.targets]
    check_same_model(output.with_suffix(".json"), description | {BLOCK: targets_block(ensemble.targets)}, tables=paths)
    return [PredictionTable(path, target) for path, target in zip(paths, ensemble.targets, strict=True)]


def _pictures(folder: str | Path | None, case: str, ensemble: Ensemble) -> list[Path]:
    if folder is None:
        return []
    return [Path(folder) / f"{case}{name_suffix(target, ensemble.targets)}.png" for target in ensemble.targets]


def _description(
    model_folder: str | Path,
    folds: Sequence[str | int],
    checkpoint: str,
    mirroring: bool,
) -> dict[str, Any]:
    """What decides the probabilities; no absolute path, so that a folder may move."""
    weights = {str(fold): file_hash(Path(model_folder) / f"fold_{fold}" / checkpoint) for fold in folds}
    return {
        "model": Path(model_folder).resolve().name,
        "checkpoint": checkpoint,
        "tta": mirroring,
        "sha256_of_folds": weights,
    }
