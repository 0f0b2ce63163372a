"""Classifiers of the same cases compared: every run against the first, subject by subject."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import BINARY, Target
from nnssl_plugin.statistics.bootstrap import paired_permutation_p, percentile_interval
from nnssl_plugin.statistics.delong import auroc_difference
from nnssl_plugin.tasks.classification.metrics import class_metrics, indicators, overall_metrics
from nnssl_plugin.tasks.classification.predictions import Predictions, predicted_labels
from nnssl_plugin.tasks.classification.summary import CONFIDENCE, SAMPLES, SEED, resampled_metrics


@dataclass(frozen=True)
class Difference:
    """A run's metric minus that of the first run; None where not defined or not tested."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    test: str  # where interval and p come from


@dataclass(frozen=True)
class ClassComparison:
    """Every run against the first, over the cases that all have."""

    target: Target
    first: str
    cases: int
    subjects: int
    differences: dict[str, dict[str, Difference]]  # run → metric → difference
    checkpoints: dict[str, str | None]  # run → ``final``, ``best``, or None where it is not known

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "target": self.target.name,
            "compared_to": self.first,
            "cases": self.cases,
            "subjects": self.subjects,
            "checkpoints": self.checkpoints,
            "bootstrap": {"confidence": CONFIDENCE, "samples": SAMPLES, "seed": SEED, "drawn": "subjects"},
            "differences": {
                run: {metric: vars(difference) for metric, difference in found.items()}
                for run, found in self.differences.items()
            },
        }


def compare_classifiers(runs: Mapping[str, Predictions]) -> ClassComparison:
    """Compare runs with the first one, over the cases that all have.

    AUROC of a class against the rest: DeLong. Accuracy: interval by bootstrap, p by a paired permutation test. All
    others: interval by bootstrap. Everything draws or sums subjects, not cases.

    Raises:
        UserError: no case is in every run, or runs disagree about target, label or subject of a case.
    """
    names = list(runs)
    shared = sorted(set.intersection(*(set(run.cases) for run in runs.values())))
    if not shared:
        raise UserError(f"No case is in all of {', '.join(names)}.", "Compare runs that predicted the same cases.")
    aligned = {name: _aligned(run, shared) for name, run in runs.items()}
    first = aligned[names[0]]
    for name, run in aligned.items():
        _check_agreement(names[0], first, name, run)
    drawn = dict(zip(names, resampled_metrics(list(aligned.values())), strict=True))
    differences = {name: _differences(aligned[name], first, drawn[name], drawn[names[0]]) for name in names[1:]}
    checkpoints = {name: run.checkpoint or None for name, run in runs.items()}
    return ClassComparison(first.target, names[0], len(shared), len(set(first.subjects)), differences, checkpoints)


def compared_metrics(target: Target) -> list[str]:
    """Names of the metrics that a comparison holds, in the order of tables and figures."""
    classes = [] if target.kind == BINARY else [f"auroc/{name}" for name in target.classes]
    first, *rest = overall_metrics(target)
    return [first, *classes, *rest]


def _aligned(run: Predictions, cases: list[str]) -> Predictions:
    row_of = {case: row for row, case in enumerate(run.cases)}
    return run.select([row_of[case] for case in cases])


def _check_agreement(first_name: str, first: Predictions, name: str, run: Predictions) -> None:
    if run.target != first.target:
        raise UserError(
            f"{first_name} predicts {first.target.name} ({', '.join(first.target.classes)}), {name} "
            f"{run.target.name} ({', '.join(run.target.classes)}).",
            "Compare runs of one target.",
        )
    differ = (indicators(run.labels, run.target) != indicators(first.labels, run.target)).any(axis=1)
    differ |= np.array(run.subjects) != np.array(first.subjects)
    if differ.any():
        raise UserError(
            f"{first_name} and {name} give {int(differ.sum())} cases another label or subject, for example "
            f"{run.cases[int(np.flatnonzero(differ)[0])]}.",
            "Train both on one classification.csv, or name the true labels with -ref FILE.csv.",
        )


def _differences(
    run: Predictions, first: Predictions, drawn: Mapping[str, np.ndarray], drawn_first: Mapping[str, np.ndarray]
) -> dict[str, Difference]:
    once = np.ones((1, len(run.cases)))
    ours, theirs = (class_metrics(p.labels, p.probabilities, once, target=p.target) for p in (run, first))
    found = {}
    for metric in compared_metrics(run.target):
        low, high = (
            percentile_interval(drawn[metric] - drawn_first[metric], confidence=CONFIDENCE)
            if len(set(run.subjects)) > 1
            else (None, None)
        )
        found[metric] = Difference(
            _plain(ours[metric][0] - theirs[metric][0]), low, high, None, "bootstrap over subjects"
        )
    positive = {f"auroc/{name}": k for k, name in enumerate(run.target.classes)}
    if run.target.kind == BINARY:
        positive = {"auroc": 1}
    for metric, k in positive.items():
        tested = auroc_difference(
            run.probabilities[:, k],
            first.probabilities[:, k],
            indicators(run.labels, run.target)[:, k],
            subjects=run.subjects,
            confidence=CONFIDENCE,
        )
        found[metric] = Difference(*map(_plain, (tested.difference, tested.low, tested.high, tested.p)), "DeLong")
    accuracy = found["accuracy"]
    p = paired_permutation_p(_right(run).astype(float) - _right(first), np.array(run.subjects))
    found["accuracy"] = Difference(
        accuracy.value, accuracy.low, accuracy.high, p, "bootstrap over subjects, permutation of subjects"
    )
    return found


def _right(run: Predictions) -> np.ndarray:
    """(N,) bool: whether a case is predicted as it is."""
    decisions = predicted_labels(run.probabilities, run.target)
    return (indicators(decisions, run.target) == indicators(run.labels, run.target)).all(axis=1)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
