"""Scores per case and label, in short: nnU-Net's summary of one run, and the paired differences of several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.statistics.bootstrap import Interval, paired_bootstrap
from nnssl_plugin.tasks.segmentation.runs import Label
from nnssl_plugin.tasks.segmentation.surfaces import Scores

METRICS = {"dice": "Dice", "hd95_mm": "HD95_mm", "nsd": "NSD"}
"""Field of :class:`Scores` → its key in JSON; Dice has nnU-Net's."""
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


@dataclass(frozen=True)
class Comparison:
    """Every run against the first, over the cases that all have."""

    first: str
    cases: tuple[str, ...]
    differences: dict[str, dict[str, dict[str, Interval]]]  # run → label (and FOREGROUND_MEAN) → metric's field

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; what is not defined is null."""
        return {
            "compared_to": self.first,
            "cases": len(self.cases),
            "bootstrap": {"confidence": CONFIDENCE, "samples": SAMPLES, "seed": SEED},
            "differences": {
                run: {
                    label: {METRICS[metric]: _plain(interval) for metric, interval in by_metric.items()}
                    for label, by_metric in by_label.items()
                }
                for run, by_label in self.differences.items()
            },
        }


def summarise(cases: Sequence[CaseScores], labels: Mapping[str, Label]) -> dict[str, Any]:
    """The content of ``summary.json``: nnU-Net's layout and means, and counts.

    As in nnU-Net, a label's mean leaves out the cases where prediction and reference are both empty, and
    ``foreground_mean`` is the mean of the labels' means (NaN as soon as one label occurs in no case).

    Args:
        cases: of one run.
        labels: name → label or region; JSON keys are made as nnU-Net makes them.
    """
    mean = {str(label): _mean_of_label([case.scores[name] for case in cases]) for name, label in labels.items()}
    return {
        FOREGROUND_MEAN: {key: float(np.mean([m[key] for m in mean.values()])) for key in METRICS.values()},
        "mean": mean,
        "label_names": {str(label): name for name, label in labels.items()},
        "metric_per_case": [
            {
                "prediction_file": str(case.prediction),
                "reference_file": str(case.reference),
                "metrics": {str(label): _metrics(case.scores[name]) for name, label in labels.items()},
            }
            for case in cases
        ],
    }


def compare_runs(by_run: Mapping[str, Sequence[CaseScores]], labels: Sequence[str]) -> Comparison:
    """Paired differences of each run to the first, with bootstrap intervals over cases.

    Raises:
        UserError: no case is in every run.
    """
    names = list(by_run)
    shared = sorted(set.intersection(*({case.case for case in cases} for cases in by_run.values())))
    if not shared:
        raise UserError(f"No case is in all of {', '.join(names)}.", "Compare runs that predicted the same cases.")
    first = names[0]
    differences = {
        run: {
            label: {
                metric: paired_bootstrap(
                    case_scores(by_run[run], label, metric, cases=shared),
                    case_scores(by_run[first], label, metric, cases=shared),
                    samples=SAMPLES,
                    confidence=CONFIDENCE,
                    seed=SEED,
                )
                for metric in METRICS
            }
            for label in (*labels, FOREGROUND_MEAN)
        }
        for run in names[1:]
    }
    return Comparison(first, tuple(shared), differences)


def case_scores(run: Sequence[CaseScores], label: str, metric: str, *, cases: Sequence[str]) -> np.ndarray:
    """One number per case, (N,) in the order of ``cases``; NaN where it is not defined.

    Args:
        run: of one run.
        label: name of a label, or FOREGROUND_MEAN: the mean of the case's labels that are defined.
        metric: field of :class:`Scores`.
        cases: names; all of them are in the run.
    """
    of_case = {case.case: case.scores for case in run}
    if label != FOREGROUND_MEAN:
        return np.array([getattr(of_case[case][label], metric) for case in cases])
    return np.array([_nanmean([getattr(s, metric) for s in of_case[case].values()]) for case in cases])


def table(summaries: Mapping[str, Mapping[str, Any]], comparison: Comparison | None) -> str:
    """A short table for people: means per run and label, then the differences."""
    names = next(iter(summaries.values()))["label_names"]
    width = max(len(text) for text in (*summaries, "mean of labels", *names.values()))
    lines = [
        f"{'run':<{width}}  {'label':<{width}}  {'cases':>5}  {'Dice':>6}  {'HD95 mm':>8}  {'NSD':>6}  "
        f"{'missed':>6}  {'spurious':>8}"
    ]
    for run, summary in summaries.items():
        for key, name in names.items():
            mean = summary["mean"][key]
            lines.append(
                f"{run:<{width}}  {name:<{width}}  {mean['n']:>5}  {_three(mean)}  {mean['n_missed']:>6}  "
                f"{mean['n_spurious']:>8}"
            )
        lines.append(f"{run:<{width}}  {'mean of labels':<{width}}  {'':>5}  {_three(summary[FOREGROUND_MEAN])}")
    for run, by_label in comparison.differences.items() if comparison else ():
        lines += ["", f"{run} − {comparison.first}: mean difference [95 % interval] over {len(comparison.cases)} cases"]
        for label, by_metric in by_label.items():
            shown = "mean of labels" if label == FOREGROUND_MEAN else label
            lines.append(
                f"{shown:<{width}}  Dice {_signed(by_metric['dice'], 4)}  "
                f"HD95 {_signed(by_metric['hd95_mm'], 2)} mm  NSD {_signed(by_metric['nsd'], 4)}"
            )
    return "\n".join(lines)


def _mean_of_label(scores: Sequence[Scores]) -> dict[str, float | int]:
    found = [(s.n_prediction > 0, s.n_reference > 0) for s in scores]
    means = {key: _nanmean([getattr(s, metric) for s in scores]) for metric, key in METRICS.items()}
    return means | {
        "n": sum(predicted or real for predicted, real in found),
        "n_both_empty": sum(not predicted and not real for predicted, real in found),
        "n_missed": sum(real and not predicted for predicted, real in found),
        "n_spurious": sum(predicted and not real for predicted, real in found),
    }


def _metrics(scores: Scores) -> dict[str, float | int]:
    values = {key: getattr(scores, metric) for metric, key in METRICS.items()}
    return values | {"n_pred": scores.n_prediction, "n_ref": scores.n_reference}


def _nanmean(values: Sequence[float]) -> float:
    defined = np.asarray(values)[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _three(mean: Mapping[str, float]) -> str:
    return f"{mean['Dice']:>6.4f}  {mean['HD95_mm']:>8.2f}  {mean['NSD']:>6.4f}"


def _signed(interval: Interval, digits: int) -> str:
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _plain(interval: Interval) -> dict[str, float | int | None]:
    return {key: None if np.isnan(value) else value for key, value in asdict(interval).items()}
