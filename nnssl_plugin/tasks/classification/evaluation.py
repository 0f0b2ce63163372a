"""Classifiers scored and compared: the folds of trainings, and tables of predictions with their labels."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.tasks.classification.checkpoints import BEST, FINAL, TOO_GOOD
from nnssl_plugin.tasks.classification.comparison import ClassComparison, compare_classifiers
from nnssl_plugin.tasks.classification.comparison_figure import draw_class_comparison
from nnssl_plugin.tasks.classification.cross_validation import accumulate_folds
from nnssl_plugin.tasks.classification.metrics import PRINTED, metric_title
from nnssl_plugin.tasks.classification.predictions import Predictions, name_suffix
from nnssl_plugin.tasks.classification.runs import find_tables, read_references, read_tables, targets_of
from nnssl_plugin.tasks.classification.summary import write_predictions_and_summary

TITLE_WIDTH = 22
"""Characters of a metric's title in printed tables."""


@dataclass(frozen=True)
class ClassRun:
    """A run that was scored."""

    folder: Path  # of its summary and figures
    predictions: dict[str, Predictions]  # target → table
    summaries: dict[str, dict[str, Any]]  # target → content of its summary.json


@dataclass(frozen=True)
class ClassEvaluation:
    """What was scored and compared."""

    runs: dict[str, ClassRun]
    comparisons: dict[str, ClassComparison]  # target → every run against the first; empty with one run


def evaluate_classification(
    places: Mapping[str, str | Path],
    output: str | Path | None = None,
    *,
    folds: Sequence[int] | None = None,
    references: str | Path | None = None,
    dataset_json: str | Path | None = None,
    checkpoint: str = FINAL,
) -> ClassEvaluation:
    """Score one or more runs and, with two or more, compare each to the first.

    The folds of a ``TRAINER__PLANS__CONFIG`` folder are pooled into its own ``crossval_results_folds_…``; every other
    run gets ``output/NAME``. With several runs ``comparison.json`` and ``comparison.png`` are written to ``output``.

    Args:
        places: name of a run → ``TRAINER__PLANS__CONFIG``, a folder with ``predictions.csv``, or such a table.
        output: folder of the results; may be None where a single training is pooled.
        folds: to pool of trainings; None: every numbered one.
        references: table ``case,subject,TARGET…`` of the true labels; None: those of the tables of predictions.
        dataset_json: defines the targets; None: what lies beside the predictions.
        checkpoint: ``final`` or ``best``, whose validations of trainings are pooled.

    Raises:
        UserError: something is missing or does not fit together.
    """
    for name in places:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise UserError(f"A run cannot be called '{name}'.", "Use letters, digits and . _ + - (-i scratch=DIR).")
    trainings = {name for name, place in places.items() if any(Path(place).glob("fold_*"))}
    if output is None and (len(places) > 1 or trainings != set(places)):
        raise UserError("No folder for the results is given.", "Name one with -o DIR.")
    runs = {}
    for name, place in places.items():
        if name in trainings and references is None:
            folder, found = accumulate_folds(place, folds=folds, checkpoint=checkpoint)
            runs[name] = ClassRun(
                folder, {t: pair[0] for t, pair in found.items()}, {t: pair[1] for t, pair in found.items()}
            )
        else:
            runs[name] = _score_tables(place, Path(output) / name, references, dataset_json, checkpoint)
    return ClassEvaluation(runs, _compare(runs, Path(output)) if len(runs) > 1 else {})


def model_folders(
    dataset: str,
    trainers: Sequence[str],
    plans: Sequence[str],
    configurations: Sequence[str],
) -> dict[str, Path]:
    """Name → ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIG`` of every combination; names hold what differs.

    Raises:
        UserError: nnUNet_results is not set, or there is no such dataset.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    results = os.environ.get("nnUNet_results")
    if not results:
        raise UserError("nnUNet_results is not set.", "export nnUNet_results=/path/to/nnUNet_results")
    try:
        home = Path(results) / maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"There is no dataset {dataset} in nnU-Net's folders.", "Check -d.") from error
    lists = (plans, trainers, configurations)
    found = {}
    for plan in plans:
        for trainer in trainers:
            for configuration in configurations:
                parts = zip((plan, trainer, configuration), lists, strict=True)
                name = "_".join(part for part, listed in parts if len(listed) > 1) or plan
                found[name] = home / f"{trainer}__{plan}__{configuration}"
    return found


def class_table(evaluation: ClassEvaluation) -> str:
    """A short table for people: metrics per run and target with their intervals, then the differences."""
    lines = []
    width = max(len(name) for name in evaluation.runs)
    for name, run in evaluation.runs.items():
        for target, summary in run.summaries.items():
            lines.append(f"{name:<{width}}  {target}, {summary['cases']} cases of {summary['subjects']} subjects")
            if summary["checkpoint"] == BEST:
                lines.append(f"{'':<{width}}  ({TOO_GOOD})")
            for metric in PRINTED:
                shown = f"{_number(summary[metric])} {_interval(*summary['intervals'][metric])}"
                lines.append(f"{'':<{width}}    {metric_title(metric):<{TITLE_WIDTH}}{shown}")
    for target, comparison in evaluation.comparisons.items():
        for run, differences in comparison.differences.items():
            lines += [
                "",
                f"{run} − {comparison.first}: {target}, over {comparison.cases} cases of "
                f"{comparison.subjects} subjects",
            ]
            best = [name for name in (run, comparison.first) if comparison.checkpoints[name] == BEST]
            if best:
                lines.append(f"{'':<{width}}  ({' and '.join(best)}: {TOO_GOOD})")
            for metric, difference in differences.items():
                p = "" if difference.p is None else f"  p = {difference.p:.3g}"
                lines.append(
                    f"{'':<{width}}    {metric_title(metric):<{TITLE_WIDTH}}{_number(difference.value, '+')} "
                    f"{_interval(difference.low, difference.high, '+')}{p}  ({difference.test})"
                )
    return "\n".join(lines)


def _score_tables(
    place: str | Path,
    folder: Path,
    references: str | Path | None,
    dataset_json: str | Path | None,
    checkpoint: str,
) -> ClassRun:
    tables = find_tables(place, checkpoint=checkpoint)
    targets = targets_of(place, dataset_json=dataset_json)
    labels = read_references(references, targets) if references else None
    found = read_tables(tables, targets, references=labels)
    predicted = [target for target in targets if target.name in found]
    summaries = {
        target.name: write_predictions_and_summary(folder, found[target.name], targets=predicted)
        for target in predicted
    }
    return ClassRun(folder, found, summaries)


def _compare(runs: Mapping[str, ClassRun], output: Path) -> dict[str, ClassComparison]:
    """Per target that every run predicts."""
    first = next(iter(runs.values()))
    targets = [p.target for name, p in first.predictions.items() if all(name in r.predictions for r in runs.values())]
    if not targets:
        raise UserError(f"No target is predicted by all of {', '.join(runs)}.", "Compare runs of one dataset.")
    comparisons = {}
    for target in targets:
        comparison = compare_classifiers({name: run.predictions[target.name] for name, run in runs.items()})
        suffix = name_suffix(target, targets)
        write_json(output / f"comparison{suffix}.json", comparison.as_dict())
        draw_class_comparison(comparison, output / f"comparison{suffix}.png")
        comparisons[target.name] = comparison
    return comparisons


def _number(value: float | None, sign: str = "") -> str:
    return "not defined" if value is None else f"{value:{sign}.4f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None else f"[{low:{sign}.4f}, {high:{sign}.4f}]"
