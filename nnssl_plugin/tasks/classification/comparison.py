"""Classifiers of the same cases compared: every run against the first, subject by subject."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import BINARY, Target
from nnssl_plugin.statistics.delong import auroc_difference
from nnssl_plugin.tasks.classification.metrics import class_measures, indicators
from nnssl_plugin.tasks.classification.predictions import Predictions, predicted_labels
from nnssl_plugin.tasks.classification.summary import CONFIDENCE, SAMPLES, SEED, percentile_interval, resampled_measures

FLIPS = 10_000
"""Random assignments of the permutation test."""
CHUNK = 2**22


@dataclass(frozen=True)
class Difference:
    """A run's measure minus that of the first run; None where not defined or not tested."""

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
    differences: dict[str, dict[str, Difference]]  # run → measure → difference

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "target": self.target.name,
            "compared_to": self.first,
            "cases": self.cases,
            "subjects": self.subjects,
            "bootstrap": {"confidence": CONFIDENCE, "samples": SAMPLES, "seed": SEED, "drawn": "subjects"},
            "differences": {
                run: {measure: vars(difference) for measure, difference in found.items()}
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
    drawn = dict(zip(names, resampled_measures(list(aligned.values())), strict=True))
    differences = {name: _differences(aligned[name], first, drawn[name], drawn[names[0]]) for name in names[1:]}
    return ClassComparison(first.target, names[0], len(shared), len(set(first.subjects)), differences)


def permutation_p(differences: np.ndarray, subjects: np.ndarray, *, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p of a paired permutation test of a mean difference.

    If neither run were better, each subject's differences could as well have the other sign; all cases of a subject
    change it together. The observed assignment counts as one of the random ones, so p is never 0 (Phipson and Smyth,
    Permutation P-values Should Never Be Zero, 2010).

    Args:
        differences: (N,) of each case.
        subjects: N names.
        flips: random assignments.
        seed: the same seed gives the same p.
    """
    _, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    sums = np.bincount(subject_of, weights=differences)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    rng, observed, extreme = np.random.default_rng(seed), abs(sums.sum()), 0
    rows = max(1, CHUNK // len(sums))
    for start in range(0, flips, rows):
        signs = rng.integers(2, size=(min(rows, flips - start), len(sums))) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= observed - 1e-9).sum())
    return (extreme + 1) / (flips + 1)


def compared_measures(target: Target) -> list[str]:
    """Names of the measures that a comparison holds, in the order of tables and figures."""
    ordinal = ["quadratic_kappa", "mean_absolute_error"] if target.kind == "ordinal" else []
    classes = [] if target.kind == BINARY else [f"auroc/{name}" for name in target.classes]
    return [
        "auroc",
        *classes,
        "average_precision",
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        *ordinal,
        "brier",
        "ece",
    ]


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
    ours, theirs = (class_measures(p.labels, p.probabilities, once, target=p.target) for p in (run, first))
    found = {}
    for measure in compared_measures(run.target):
        low, high = (
            percentile_interval(drawn[measure] - drawn_first[measure]) if len(set(run.subjects)) > 1 else (None, None)
        )
        found[measure] = Difference(
            _plain(ours[measure][0] - theirs[measure][0]), low, high, None, "bootstrap over subjects"
        )
    positive = {f"auroc/{name}": k for k, name in enumerate(run.target.classes)}
    if run.target.kind == BINARY:
        positive = {"auroc": 1}
    for measure, k in positive.items():
        tested = auroc_difference(
            run.probabilities[:, k],
            first.probabilities[:, k],
            indicators(run.labels, run.target)[:, k],
            subjects=run.subjects,
            confidence=CONFIDENCE,
        )
        found[measure] = Difference(*map(_plain, (tested.difference, tested.low, tested.high, tested.p)), "DeLong")
    accuracy = found["accuracy"]
    p = permutation_p(_right(run).astype(float) - _right(first), np.array(run.subjects))
    found["accuracy"] = Difference(
        accuracy.value, accuracy.low, accuracy.high, p, "bootstrap over subjects, permutation of subjects"
    )
    return found


def _right(run: Predictions) -> np.ndarray:
    """(N,) bool: whether a case is predicted as it is."""
    answers = predicted_labels(run.probabilities, run.target)
    return (indicators(answers, run.target) == indicators(run.labels, run.target)).all(axis=1)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
