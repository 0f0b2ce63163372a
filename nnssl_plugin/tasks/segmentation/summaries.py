"""Scores per case and label, in short: nnU-Net's summary of one run, and the paired differences of several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.statistics.bootstrap import Interval, paired_bootstrap
from nnssl_plugin.statistics.metric import Metric
from nnssl_plugin.tasks.segmentation.metrics import METRICS
from nnssl_plugin.tasks.segmentation.runs import Label
from nnssl_plugin.tasks.segmentation.surfaces import Scores

FOREGROUND_MEAN = "foreground_mean"
CONFIDENCE, SAMPLES, SEED = 0.95, 10_000, 0


@dataclass(frozen=True)
class CaseScores:
    """Scores of one prediction file, label by label."""

    run: str
    case: str
    prediction: Path
    reference: Path
    scores: dict[str, Scores]  # name of the label → scores
    odd: tuple[str, ...] = ()  # what a user should know of the two files


@dataclass(frozen=True)
class Comparison:
    """Every run against the first, over the cases that all have."""

    first: str
    cases: tuple[str, ...]
    subjects: int
    metrics: tuple[Metric, ...]
    differences: dict[str, dict[str, dict[str, Interval]]]  # run → label (and FOREGROUND_MEAN) → metric's name

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; what is not defined is null."""
        return {
            "compared_to": self.first,
            "cases": len(self.cases),
            "subjects": self.subjects,
            "bootstrap": {"confidence": CONFIDENCE, "samples": SAMPLES, "seed": SEED, "drawn": "subjects"},
            "differences": {
                run: {
                    label: {metric.key: _plain(by_metric[metric.name]) for metric in self.metrics}
                    for label, by_metric in by_label.items()
                }
                for run, by_label in self.differences.items()
            },
        }


def summarise(
    cases: Sequence[CaseScores], labels: Mapping[str, Label], metrics: Sequence[Metric] = METRICS
) -> dict[str, Any]:
    """The content of ``summary.json``: nnU-Net's layout and means, and counts.

    As in nnU-Net, a label's mean leaves out the cases where prediction and reference are both empty, and
    ``foreground_mean`` is the mean of the labels' means (NaN as soon as one label occurs in no case).

    Args:
        cases: of one run.
        labels: name → label or region; JSON keys are made as nnU-Net makes them.
        metrics: those that were computed.
    """
    mean = {
        str(label): _mean_of_label([case.scores[name] for case in cases], metrics) for name, label in labels.items()
    }
    return {
        FOREGROUND_MEAN: {m.key: float(np.mean([of_label[m.key] for of_label in mean.values()])) for m in metrics},
        "mean": mean,
        "label_names": {str(label): name for name, label in labels.items()},
        "metric_per_case": [
            {
                "prediction_file": str(case.prediction),
                "reference_file": str(case.reference),
                "metrics": {str(label): _plain_scores(case.scores[name], metrics) for name, label in labels.items()},
            }
            for case in cases
        ],
    }


def compare_runs(
    by_run: Mapping[str, Sequence[CaseScores]],
    labels: Sequence[str],
    *,
    subjects: Mapping[str, str] | None = None,
    metrics: Sequence[Metric] = METRICS,
) -> Comparison:
    """Paired differences of each run to the first, with bootstrap intervals over subjects.

    Args:
        by_run: scores of every run, the first one being what the others are compared to.
        labels: names.
        subjects: case → subject; None: each case is its own.
        metrics: those that were computed.

    Raises:
        UserError: no case is in every run.
    """
    names = list(by_run)
    shared = sorted(set.intersection(*({case.case for case in cases} for cases in by_run.values())))
    if not shared:
        raise UserError(f"No case is in all of {', '.join(names)}.", "Compare runs that predicted the same cases.")
    first = names[0]
    subject_of = [subjects[case] if subjects else case for case in shared]
    differences = {
        run: {
            label: {
                metric.name: paired_bootstrap(
                    case_scores(by_run[run], label, metric.name, cases=shared),
                    case_scores(by_run[first], label, metric.name, cases=shared),
                    subjects=subject_of,
                    samples=SAMPLES,
                    confidence=CONFIDENCE,
                    seed=SEED,
                )
                for metric in metrics
            }
            for label in (*labels, FOREGROUND_MEAN)
        }
        for run in names[1:]
    }
    return Comparison(first, tuple(shared), len(set(subject_of)), tuple(metrics), differences)


def case_scores(run: Sequence[CaseScores], label: str, metric: str, *, cases: Sequence[str]) -> np.ndarray:
    """One number per case, (N,) in the order of ``cases``; NaN where it is not defined.

    Args:
        run: of one run.
        label: name of a label, or FOREGROUND_MEAN: the mean of the case's labels that are defined.
        metric: name of a metric, field of :class:`Scores`.
        cases: names; all of them are in the run.
    """
    of_case = {case.case: case.scores for case in run}
    if label != FOREGROUND_MEAN:
        return np.array([getattr(of_case[case][label], metric) for case in cases])
    return np.array([_nanmean([getattr(s, metric) for s in of_case[case].values()]) for case in cases])


def table(
    summaries: Mapping[str, Mapping[str, Any]], comparison: Comparison | None, metrics: Sequence[Metric] = METRICS
) -> str:
    """A short table for people: means per run and label, then the differences."""
    names = next(iter(summaries.values()))["label_names"]
    width = max(len(text) for text in (*summaries, "mean of labels", *names.values()))
    titles = "  ".join(f"{m.title:>{_width(m)}}" for m in metrics)
    lines = [f"{'run':<{width}}  {'label':<{width}}  {'cases':>5}  {titles}  {'missed':>6}  {'spurious':>8}"]
    for run, summary in summaries.items():
        for key, name in names.items():
            mean = summary["mean"][key]
            lines.append(
                f"{run:<{width}}  {name:<{width}}  {mean['n']:>5}  {_numbers(mean, metrics)}  {mean['n_missed']:>6}  "
                f"{mean['n_spurious']:>8}"
            )
        lines.append(
            f"{run:<{width}}  {'mean of labels':<{width}}  {'':>5}  {_numbers(summary[FOREGROUND_MEAN], metrics)}"
        )
    for run, by_label in comparison.differences.items() if comparison else ():
        lines += ["", f"{run} − {comparison.first}: mean difference [95 % interval] over {counted(comparison)}"]
        for label, by_metric in by_label.items():
            name = "mean of labels" if label == FOREGROUND_MEAN else label
            shown = ",  ".join(f"{m.title} {_signed(by_metric[m.name], m.digits)}" for m in metrics)
            lines.append(f"{'':<{width}}  {name:<{width}}  {shown}")
    return "\n".join(lines)


def counted(comparison: Comparison) -> str:
    """Over how many cases and subjects a comparison runs."""
    cases = len(comparison.cases)
    of = f" of {comparison.subjects} subjects" if comparison.subjects < cases else ""
    return f"{cases} cases{of}"


def _mean_of_label(scores: Sequence[Scores], metrics: Sequence[Metric]) -> dict[str, float | int]:
    found = [(s.n_prediction > 0, s.n_reference > 0) for s in scores]
    means = {metric.key: _nanmean([getattr(s, metric.name) for s in scores]) for metric in metrics}
    return means | {
        "n": sum(predicted or real for predicted, real in found),
        "n_both_empty": sum(not predicted and not real for predicted, real in found),
        "n_missed": sum(real and not predicted for predicted, real in found),
        "n_spurious": sum(predicted and not real for predicted, real in found),
    }


def _plain_scores(scores: Scores, metrics: Sequence[Metric]) -> dict[str, float | int]:
    values = {metric.key: getattr(scores, metric.name) for metric in metrics}
    return values | {"n_pred": scores.n_prediction, "n_ref": scores.n_reference}


def _nanmean(values: Sequence[float]) -> float:
    defined = np.asarray(values)[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _width(metric: Metric) -> int:
    return max(6, len(metric.title))


def _numbers(mean: Mapping[str, float], metrics: Sequence[Metric]) -> str:
    return "  ".join(f"{mean[m.key]:>{_width(m)}.{m.digits}f}" for m in metrics)


def _signed(interval: Interval, digits: int) -> str:
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _plain(interval: Interval) -> dict[str, float | int | None]:
    return {key: None if np.isnan(value) else value for key, value in asdict(interval).items()}
