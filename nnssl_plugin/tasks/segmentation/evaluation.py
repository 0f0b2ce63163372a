"""Segmentations scored against references: per case and label, their means, and runs compared case by case."""

import csv
import multiprocessing
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.nnunet.subjects import subjects_of_cases
from nnssl_plugin.statistics.metric import Metric
from nnssl_plugin.tasks.segmentation.comparison_figure import draw_comparison
from nnssl_plugin.tasks.segmentation.label_files import on_grid_of, read_label_file, shown_values, unknown_values
from nnssl_plugin.tasks.segmentation.metrics import METRICS, SURFACE_METRICS, available_metrics
from nnssl_plugin.tasks.segmentation.runs import (
    References,
    Run,
    check_same_labels,
    find_references,
    find_run,
    find_source,
)
from nnssl_plugin.tasks.segmentation.summaries import CaseScores, Comparison, compare_runs, summarise
from nnssl_plugin.tasks.segmentation.surfaces import Scores, score_masks, score_overlap


@dataclass(frozen=True)
class Evaluation:
    """What was found, and where it was written."""

    folder: Path
    runs: tuple[Run, ...]
    summaries: dict[str, dict]  # run → content of its summary.json
    comparison: Comparison | None  # None with one run
    metrics: tuple[Metric, ...]  # those that could be computed
    odd: dict[str, dict[str, list[str]]]  # run → what is odd → cases


@dataclass(frozen=True)
class _Task:
    run: str
    case: str
    prediction: Path
    references: References
    tolerance_mm: float
    score: Callable[..., Scores]


@dataclass(frozen=True)
class _Scored:
    scores: CaseScores
    predicted: frozenset[int]  # values of the prediction
    true: frozenset[int]


def evaluate_segmentation(
    folders: Mapping[str, str | Path],
    output: str | Path,
    *,
    references: str | Path | None = None,
    dataset_json: str | Path | None = None,
    folds: Sequence[int] | None = None,
    tolerance_mm: float = 1.0,
    processes: int = 2,
    subjects: str | Path | None = None,
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
        subjects: table ``case,subject``, by which intervals are drawn; None: ``classification.csv`` of the raw dataset,
            and without that each case is its own subject.

    Raises:
        UserError: something is missing, does not fit together or cannot be read, with the file's name.
    """
    for name in folders:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise UserError(f"A run cannot be called '{name}'.", "Use letters, digits and . _ + - (-i scratch=DIR).")
    if tolerance_mm < 0:
        raise UserError(f"The tolerance is {tolerance_mm} mm.", "Give 0 or more: --tolerance-mm 1.0")
    sources = {name: find_source(folder, folds=folds) for name, folder in folders.items()}
    first = next(iter(sources.values()))
    scored_against = find_references(first, references=references, dataset_json=dataset_json)
    if dataset_json is None:
        check_same_labels(sources, scored_against)
    runs = tuple(find_run(name, source, scored_against) for name, source in sources.items())
    subject_of = subjects_of_cases(
        sorted({case for run in runs for case in run.predictions}), table=subjects, raw_folder=scored_against.raw_folder
    )
    metrics = available_metrics()
    score = score_masks if set(SURFACE_METRICS) <= set(metrics) else score_overlap
    tasks = [
        _Task(run.name, case, path, scored_against, tolerance_mm, score)
        for run in runs
        for case, path in run.predictions.items()
    ]
    scored = list(tqdm(_score_all(tasks, processes), total=len(tasks), desc="evaluate", unit="case"))
    for run in runs:
        _check_values([one for one in scored if one.scores.run == run.name], scored_against)
    return _write(
        Path(output),
        runs,
        scored_against,
        [one.scores for one in scored],
        subjects=subject_of,
        metrics=metrics,
        tolerance_mm=tolerance_mm,
    )


def _score_case(task: _Task) -> _Scored:
    """Every label's scores of one prediction file.

    Raises:
        UserError: a file cannot be read or holds no labels, or the two do not lie on one grid.
    """
    from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask

    known = task.references
    reference = read_label_file(known.folder / f"{task.case}{known.ending}", known.reader)
    prediction = on_grid_of(read_label_file(task.prediction, known.reader), reference)
    values = [frozenset(file.values()) for file in (prediction, reference)]
    # a single slice is measured in its plane
    flat = tuple(0 if size == 1 else slice(None) for size in reference.array.shape)
    spacing = [edge for size, edge in zip(reference.array.shape, reference.spacing, strict=True) if size > 1]
    predicted, true = prediction.array[flat], reference.array[flat]
    valid = true != known.ignore_label if known.ignore_label is not None else True
    scores = {}
    for name, label in known.labels.items():
        masks = [region_or_label_to_mask(array, label) & valid for array in (predicted, true)]
        scores[name] = task.score(*masks, spacing=spacing, tolerance_mm=task.tolerance_mm)
    odd = (
        *prediction.odd,
        *(f"its reference: {text}" for text in reference.odd),
        *_unknown(values[0], known, "holds"),
        *_unknown(values[1], known, "its reference holds"),
    )
    return _Scored(CaseScores(task.run, task.case, task.prediction, reference.path, scores, odd), *values)


def _unknown(values: frozenset[int], known: References, holds: str) -> Iterator[str]:
    unknown = unknown_values(values, known.known_values)
    if unknown:
        yield f"{holds} {shown_values(unknown)}, which dataset.json does not name: counted as background"


def _check_values(scored: Sequence[_Scored], known: References) -> None:
    """Refuse a run, or its references, whose files hold other values than the labels and none of them.

    Raises:
        UserError: naming the values.
    """
    for kind, path, found in (
        ("predictions", scored[0].scores.prediction, [one.predicted for one in scored]),
        ("references", scored[0].scores.reference, [one.true for one in scored]),
    ):
        values = frozenset().union(*found)
        if values & known.known_values or not unknown_values(values, ()):
            continue
        named = ", ".join(f"{name} {label}" for name, label in known.labels.items())
        raise UserError(
            f"The {kind} in {path.parent} hold the values {shown_values(sorted(values))} and no label of dataset.json "
            f"({named}).",
            "Write the labels' own numbers (a mask of 255 as 1), or name the dataset.json that fits with -djfile.",
        )


def _score_all(tasks: list[_Task], processes: int) -> Iterator[_Scored]:
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
    folder: Path,
    runs: tuple[Run, ...],
    references: References,
    scores: list[CaseScores],
    *,
    subjects: Mapping[str, str],
    metrics: tuple[Metric, ...],
    tolerance_mm: float,
) -> Evaluation:
    by_run = {run.name: [case for case in scores if case.run == run.name] for run in runs}
    odd = {run.name: _cases_by_oddity(by_run[run.name]) for run in runs}
    _write_scores(folder / "scores.csv", scores)
    summaries = {}
    for run in runs:
        summaries[run.name] = summarise(by_run[run.name], references.labels, metrics)
        summaries[run.name] |= {
            "missing_predictions": list(run.missing),
            "tolerance_mm": tolerance_mm,
            "warnings": odd[run.name],
        }
        write_json(folder / run.name / "summary.json", summaries[run.name])
    comparison = None
    if len(runs) > 1:
        comparison = compare_runs(by_run, list(references.labels), subjects=subjects, metrics=metrics)
        write_json(folder / "comparison.json", comparison.as_dict() | {"tolerance_mm": tolerance_mm})
        draw_comparison(by_run, comparison, folder / "comparison.png")
    return Evaluation(folder, runs, summaries, comparison, metrics, odd)


def _cases_by_oddity(scores: Sequence[CaseScores]) -> dict[str, list[str]]:
    cases = defaultdict(list)
    for case in scores:
        for text in case.odd:
            cases[text].append(case.case)
    return dict(cases)


def _write_scores(path: Path, scores: list[CaseScores]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "case", "label", *(metric.name for metric in METRICS)])
        for case in scores:
            for label, values in case.scores.items():
                table.writerow([case.run, case.case, label, *(_cell(values, metric) for metric in METRICS)])


def _cell(values: Scores, metric: Metric) -> str:
    value = getattr(values, metric.name)
    return "" if np.isnan(value) else f"{value:.6g}"
