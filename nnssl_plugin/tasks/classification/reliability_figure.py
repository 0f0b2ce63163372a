"""Whether probabilities come true: shares per bin of predicted probability."""

from collections.abc import Iterator, Mapping

import numpy as np
from sklearn.calibration import CalibrationDisplay

from nnssl_plugin.io.figures import COLOURS
from nnssl_plugin.nnunet.case_labels import BINARY, MULTILABEL
from nnssl_plugin.tasks.classification.curves import (
    GREY,
    Interval,
    bracket,
    colours_of_classes,
    heading,
    legend_entries,
)
from nnssl_plugin.tasks.classification.metrics import BINS, bin_of, calibration_pairs
from nnssl_plugin.tasks.classification.predictions import Predictions, predicted_labels

WITH_BARS = 3
"""Beyond so many curves, bars would hide them."""


def draw_reliability(axis, predictions: Predictions, intervals: Mapping[str, Interval]) -> list:
    """Draw a curve of the second class of a binary target, of every class of a multi-label one, else of the most
    probable class, with the number of cases per bin where there is one curve; returns what goes into the legend.
    """
    target, probabilities = predictions.target, predictions.probabilities
    pairs = calibration_pairs(predictions.labels, predicted_labels(probabilities, target), probabilities, target)
    colours = colours_of_classes(predictions) if target.kind == MULTILABEL else {0: COLOURS[0]}
    for k, pair in enumerate(pairs):
        name = {BINARY: target.classes[1], MULTILABEL: target.classes[k]}.get(target.kind, "the most probable class")
        _draw_curve(axis, *pair, colour=colours.get(k, GREY), name=name)
        if k in colours and len(pairs) <= WITH_BARS:
            _draw_bars(axis, *pair, colour=colours[k])
    if len(colours) < len(pairs):
        axis.plot([], [], color=GREY, label=f"{len(pairs) - len(colours)} other classes")
    if len(pairs) == 1:
        _write_counts(axis, *pairs[0])
    axis.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="as predicted")
    error = np.mean([_gap(*pair) for pair in pairs])
    axis.plot([], [], " ", label=f"expected calibration error {error:.3f}{bracket(intervals.get('ece'))}, {BINS} bins")
    notes = ["bars: 95 % Wilson intervals"] * (len(pairs) <= WITH_BARS) + ["numbers: cases in the bin"] * (
        len(pairs) == 1
    )
    if notes:
        axis.plot([], [], " ", label="; ".join(notes))
    axis.set_title(f"{heading(predictions)}: do its probabilities come true?")
    axis.set_xlabel("predicted probability (mean of the bin)")
    axis.set_ylabel("share of these cases for which it came true")
    return legend_entries(axis)


def _draw_curve(axis, claimed: np.ndarray, came_true: np.ndarray, *, colour: str, name: str) -> None:
    points = [(claimed[members].mean(), came_true[members].mean()) for members in _bins(claimed)]
    predicted, true = zip(*points, strict=True)
    style = {"linewidth": 1, "zorder": 1, "marker": ""} if colour == GREY else {"marker": "o", "markersize": 5}
    CalibrationDisplay(true, predicted, claimed).plot(ax=axis, name=name, ref_line=False, color=colour, **style)
    if colour == GREY:
        axis.lines[-1].set_label(None)


def _draw_bars(axis, claimed: np.ndarray, came_true: np.ndarray, *, colour: str) -> None:
    from scipy.stats import binomtest

    for members in _bins(claimed):
        hits, mean = int(came_true[members].sum()), claimed[members].mean()
        axis.plot(
            [mean, mean],
            binomtest(hits, len(members)).proportion_ci(method="wilson"),
            color=colour,
            linewidth=1.2,
            marker="_",
        )


def _write_counts(axis, claimed: np.ndarray, came_true: np.ndarray) -> None:
    for members in _bins(claimed):
        position = (claimed[members].mean(), came_true[members].mean())
        left = position[0] > 0.97
        axis.annotate(
            str(len(members)),
            position,
            xytext=(-7 if left else 7, -4),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize="small",
        )


def _bins(claimed: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of each bin that holds any."""
    bins = bin_of(claimed)
    for number in np.unique(bins):
        yield np.flatnonzero(bins == number)


def _gap(claimed: np.ndarray, came_true: np.ndarray) -> float:
    return sum(abs((claimed - came_true)[members].sum()) for members in _bins(claimed)) / len(claimed)
