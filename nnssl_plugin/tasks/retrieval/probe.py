"""What the vectors of an index tell of a class: nearest neighbours and a linear classifier, with folds by subject."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.case_labels import is_missing
from nnssl_plugin.statistics.areas import areas
from nnssl_plugin.statistics.bootstrap import percentile_interval, subject_weights
from nnssl_plugin.tasks.retrieval.index import Index, load_index
from nnssl_plugin.tasks.retrieval.standardisation import Standardisation, statistics_of

FOLDS = 5
NEIGHBOURS = 10
REGULARISATION = 0.1
"""Inverse strength C of the linear probe, on standardised vectors, for every index alike."""
KNN, LINEAR = "knn", "linear"
METRICS = ("accuracy", "macro_f1", "auroc")


def evaluate_probe(
    indexes: Mapping[str, str | Path],
    target: str,
    *,
    output: str | Path | None = None,
    folds: int = FOLDS,
    neighbours: int = NEIGHBOURS,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Predict a column from the vectors of each index, every row by a model that saw nothing of its subject.

    Folds are stratified by class and grouped by subject (scikit-learn); the predictions of all folds are scored
    together, with intervals that draw subjects. Standardisation is measured on each fold's training rows.

    Args:
        indexes: name → folder.
        target: the column; rows without a class are left out.
        output: JSON file; None: none.
        folds: at most as many as the rarest class has subjects.
        neighbours: of the nearest-neighbour probe (cosine, weighed by 1 − distance).
        samples: draws of the bootstrap.
        seed: of folds and draws.

    Returns:
        ``target``, ``classes``, ``rows``, ``subjects``, ``folds``, and ``results``: index → ``knn`` and ``linear`` →
        metric → ``value`` and ``interval``.

    Raises:
        UserError: no such column, fewer than two classes, or a class of one subject.
    """
    results: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for name, folder in indexes.items():
        index = load_index(folder)
        labels, subjects, rows = _labelled(index, target)
        used = _folds(labels, subjects, folds, target)
        about = {"classes": _counts(labels), "rows": len(rows), "subjects": len(set(subjects)), "folds": used}
        parts = list(StratifiedGroupKFold(used, shuffle=True, random_state=seed).split(rows, labels, subjects))
        vectors = np.asarray(index.vectors[rows], dtype=np.float32)
        results[name] = {
            probe: _scores(
                _predicted(probe, vectors, labels, parts, index, neighbours), labels, subjects, samples, seed
            )
            for probe in (KNN, LINEAR)
        }
    found = {"target": target, **about, "results": results}
    if output is not None:
        write_json(output, found)
    return found


def probe_table(found: Mapping[str, Any]) -> str:
    """Lines for a terminal."""
    classes = ", ".join(f"{name} {count}" for name, count in found["classes"].items())
    width = max(map(len, found["results"])) + 2
    lines = [
        f"{found['target']} of {found['rows']} rows, {found['subjects']} subjects, {found['folds']} folds: {classes}",
        " " * (width + 8) + "".join(f"{metric:>26}" for metric in METRICS),
    ]
    for name, probes in found["results"].items():
        for probe, scores in probes.items():
            cells = "".join(f"{_cell(scores[metric]):>26}" for metric in METRICS)
            lines.append(f"{name:<{width}}{probe:<8}{cells}")
    return "\n".join(lines)


def _labelled(index: Index, target: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cells = index.column(target)
    rows = np.flatnonzero([not is_missing(cell) for cell in cells])
    return cells[rows].astype(str), index.column("subject")[rows].astype(str), rows


def _folds(labels: np.ndarray, subjects: np.ndarray, folds: int, target: str) -> int:
    of_class = {name: len(set(subjects[labels == name])) for name in np.unique(labels)}
    if len(of_class) < 2 or min(of_class.values()) < 2:
        counted = ", ".join(f"{name} {count}" for name, count in of_class.items()) or "none"
        raise UserError(
            f"'{target}' cannot be predicted; subjects per class: {counted}.",
            "It takes two classes, each of two subjects: add images, or empty the cells of rare classes.",
        )
    return min(folds, *of_class.values())


def _counts(labels: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(labels, return_counts=True)
    return dict(zip(map(str, names), map(int, counts), strict=True))


def _predicted(
    probe: str, vectors: np.ndarray, labels: np.ndarray, parts: list, index: Index, neighbours: int
) -> np.ndarray:
    """(N, classes) probabilities, the classes sorted by name."""
    classes = np.unique(labels)
    probabilities = np.zeros((len(vectors), len(classes)))
    for training, test in parts:
        model = _nearest(vectors[training], index, neighbours) if probe == KNN else _linear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(vectors[training], labels[training])
        columns = np.searchsorted(classes, model.classes_)
        probabilities[np.ix_(test, columns)] = model.predict_proba(vectors[test])
    return probabilities


def _linear() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=2000))


class _Nearest:
    """Neighbours under the distance of the index, whose statistics are here those of the training rows."""

    def __init__(self, standardise: Standardisation, neighbours: int):
        self._standardise = standardise
        self._model = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda distances: 2 - distances)

    def fit(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        self._model.fit(self._standardise(vectors), labels)
        self.classes_ = self._model.classes_

    def predict_proba(self, vectors: np.ndarray) -> np.ndarray:
        return self._model.predict_proba(self._standardise(vectors))


def _nearest(training: np.ndarray, index: Index, neighbours: int) -> _Nearest:
    statistics = statistics_of(training) if index.is_standardised else None
    return _Nearest(Standardisation(statistics, training.shape[1]), min(neighbours, len(training)))


def _scores(probabilities: np.ndarray, labels: np.ndarray, subjects: np.ndarray, samples: int, seed: int) -> dict:
    values = _measured(probabilities, labels, np.ones((1, len(labels))))
    drawn = [_measured(probabilities, labels, w) for w in subject_weights(list(subjects), samples=samples, seed=seed)]
    return {
        metric: {
            "value": float(values[metric][0]),
            "interval": percentile_interval(np.concatenate([each[metric] for each in drawn])),
        }
        for metric in METRICS
    }


def _measured(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric (S,) for weightings (S, N) of the rows: accuracy, F1 as the mean over the classes, and AUROC, of two
    classes the second's, else the mean of each against the rest; NaN where a weighting lacks a class."""
    classes = np.unique(labels)
    truth = labels[:, None] == classes
    predicted = np.eye(len(classes), dtype=bool)[probabilities.argmax(axis=1)]
    both, either = weights @ (truth & predicted), weights @ truth.astype(float) + weights @ predicted.astype(float)
    f1 = np.where(weights @ truth > 0, 2 * both / np.maximum(either, 1), np.nan)
    auroc = np.stack([areas(probabilities[:, k], truth[:, k], weights)[0] for k in range(len(classes))])
    return {
        "accuracy": both.sum(axis=1) / weights.sum(axis=1),
        "macro_f1": f1.mean(axis=1),
        "auroc": auroc[1] if len(classes) == 2 else auroc.mean(axis=0),
    }


def _cell(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
