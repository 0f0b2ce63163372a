"""Segmentations held against references: scores per case and label, means, and runs compared case by case."""

import csv
import multiprocessing
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError
from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.tasks.segmentation.comparison_figure import draw_comparison
from nnssl_plugin.tasks.segmentation.runs import Run, Standard, check_same_labels, find_run, find_source, find_standard
from nnssl_plugin.tasks.segmentation.summaries import METRICS, CaseScores, Comparison, compare_runs, summarise
from nnssl_plugin.tasks.segmentation.surfaces import Scores, check_monai, score_masks

UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, AssertionError, zlib.error, ImageFileError)
"""What nnU-Net's readers raise for damaged files."""


@dataclass(frozen=True)
class Evaluation:
    """What was found, and where it was written."""

    folder: Path
    runs: tuple[Run, ...]
    summaries: dict[str, dict]  # run → content of its summary.json
    comparison: Comparison | None  # None with one run


@dataclass(frozen=True)
class _Task:
    run: str
    case: str
    prediction: Path
    standard: Standard
    tolerance_mm: float


def evaluate_segmentation(
    folders: Mapping[str, str | Path],
    output: str | Path,
    *,
    references: str | Path | None = None,
    dataset_json: str | Path | None = None,
    folds: Sequence[int] | None = None,
    tolerance_mm: float = 1.0,
    processes: int = 2,
) -> Evaluation:
    """Score one or more runs and, with two or more, compare each to the first, paired by case.

    Writes ``scores.csv``, ``NAME/summary.json`` per run, and with several runs ``comparison.json`` and
    ``comparison.png``. Definitions and conventions: :func:`~nnssl_plugin.tasks.segmentation.surfaces.score_masks`.

    Args:
        folders: name of a run → predictions, ``fold_X/validation``, or ``TRAINER__PLANS__CONFIG`` (its folds pooled).
        output: folder of the results.
        references: folder of reference segmentations; None: ``gt_segmentations`` of the first run's dataset.
        dataset_json: defines the labels; None: found beside the first run's results or the references.
        folds: to pool of result folders; None: every numbered fold.
        tolerance_mm: of the normalised surface distance.
        processes: worker processes; 1 works in this one.

    Raises:
        UserError: something is missing, does not fit together or cannot be read, with the file's name.
    """
    check_monai()
    for name in folders:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise UserError(f"A run cannot be called '{name}'.", "Use letters, digits and . _ + - (-i scratch=DIR).")
    if tolerance_mm < 0:
        raise UserError(f"The tolerance is {tolerance_mm} mm.", "Give 0 or more: --tolerance-mm 1.0")
    sources = {name: find_source(folder, folds=folds) for name, folder in folders.items()}
    first = next(iter(sources.values()))
    standard = find_standard(first, references=references, dataset_json=dataset_json)
    if dataset_json is None:
        check_same_labels(sources, standard)
    runs = tuple(find_run(name, source, standard) for name, source in sources.items())
    tasks = [
        _Task(run.name, case, path, standard, tolerance_mm) for run in runs for case, path in run.predictions.items()
    ]
    progress = tqdm(_score_all(tasks, processes), total=len(tasks), desc="evaluate", unit="case")
    return _write(Path(output), runs, standard, list(progress), tolerance_mm)


def _score_case(task: _Task) -> CaseScores:
    """Every label's scores of one prediction file.

    Raises:
        UserError: a file cannot be read, or the two differ in shape or spacing.
    """
    from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask

    standard = task.standard
    reference_path = standard.folder / f"{task.case}{standard.ending}"
    prediction, spacing = _read(task.prediction, standard.reader)
    reference, reference_spacing = _read(reference_path, standard.reader)
    if prediction.shape != reference.shape:
        raise UserError(
            f"{task.prediction} has {prediction.shape} voxels, {reference_path} {reference.shape}.",
            "Predict the case again, from the image that the reference belongs to.",
        )
    if not np.allclose(spacing, reference_spacing, rtol=1e-3):
        raise UserError(
            f"{task.prediction} has a spacing of {spacing} mm, {reference_path} of {reference_spacing}.",
            "Predict the case again, from the image that the reference belongs to.",
        )
    valid = reference != standard.ignore_label if standard.ignore_label is not None else True
    scores = {}
    for name, label in standard.labels.items():
        masks = [region_or_label_to_mask(array, label) & valid for array in (prediction, reference)]
        scores[name] = score_masks(*masks, spacing=reference_spacing, tolerance_mm=task.tolerance_mm)
    return CaseScores(task.run, task.case, task.prediction, reference_path, scores)


def _read(path: Path, reader: type) -> tuple[np.ndarray, tuple[float, ...]]:
    """A segmentation and its spacing in mm, without axes of length 1: a single slice is measured in its plane."""
    try:
        array, properties = reader().read_seg(str(path))
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}", "Predict the case again, or restore the file.") from error
    array = array[0]
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    # headers hold single precision: 0.8 mm comes back as 0.80000001
    return array.squeeze(), tuple(float(f"{properties['spacing'][axis]:.6g}") for axis in axes)


def _score_all(tasks: list[_Task], processes: int) -> Iterator[CaseScores]:
    """In the order of the tasks."""
    if min(processes, len(tasks)) <= 1:
        yield from map(_score_case, tasks)
        return
    pool = ProcessPoolExecutor(min(processes, len(tasks)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_score_case, tasks)
    except BrokenProcessPool as error:
        raise UserError("A worker was killed, likely for want of memory.", "Run it again with -np 1.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write(
    folder: Path, runs: tuple[Run, ...], standard: Standard, scores: list[CaseScores], tolerance_mm: float
) -> Evaluation:
    by_run = {run.name: [case for case in scores if case.run == run.name] for run in runs}
    _write_scores(folder / "scores.csv", scores)
    summaries = {}
    for run in runs:
        summaries[run.name] = summarise(by_run[run.name], standard.labels)
        summaries[run.name] |= {"missing_predictions": list(run.missing), "tolerance_mm": tolerance_mm}
        write_json(folder / run.name / "summary.json", summaries[run.name])
    comparison = None
    if len(runs) > 1:
        comparison = compare_runs(by_run, list(standard.labels))
        write_json(folder / "comparison.json", comparison.as_dict() | {"tolerance_mm": tolerance_mm})
        draw_comparison(by_run, comparison, folder / "comparison.png")
    return Evaluation(folder, runs, summaries, comparison)


def _write_scores(path: Path, scores: list[CaseScores]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "case", "label", *METRICS])
        for case in scores:
            for label, values in case.scores.items():
                table.writerow([case.run, case.case, label, *(_cell(values, metric) for metric in METRICS)])


def _cell(values: Scores, metric: str) -> str:
    value = getattr(values, metric)
    return "" if np.isnan(value) else f"{value:.6g}"
