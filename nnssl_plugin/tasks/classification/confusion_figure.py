"""Confusion matrices: counts of true and predicted classes, coloured by the share of each true class."""

import math

import numpy as np
from sklearn.metrics import ConfusionMatrixDisplay

from nnssl_plugin.io.figures import pyplot
from nnssl_plugin.nnunet.case_labels import MULTILABEL
from nnssl_plugin.tasks.classification.curves import heading
from nnssl_plugin.tasks.classification.metrics import indicators
from nnssl_plugin.tasks.classification.predictions import Predictions, predicted_labels

COLUMNS = 4
DARK = 0.55
"""Share from which a cell is so dark that its text is white."""
WITH_SHARES = 10
"""Up to so many classes, cells also hold the share of their row."""


def draw_confusion(predictions: Predictions):
    """A matplotlib figure: rows are true, columns predicted; of a multi-label target one small table per class."""
    plt = pyplot()

    target = predictions.target
    truth = indicators(predictions.labels, target)
    decisions = indicators(predicted_labels(predictions.probabilities, target), target)
    if target.kind != MULTILABEL:
        size = 3.5 + 0.75 * len(target.classes)
        figure, axis = plt.subplots(figsize=(max(5.5, size), max(4.5, size - 0.8)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches; names outside the axes end at its edge
        _draw_table(axis, truth.T.astype(int) @ decisions.astype(int), target.classes)
        figure.suptitle(f"{heading(predictions)}: confusion matrix", fontsize="medium")
        axis.set_xlabel("predicted")
        axis.set_ylabel("true (number of cases)")
        return figure
    columns = min(COLUMNS, len(target.classes))
    rows = math.ceil(len(target.classes) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.2 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for k, axis in enumerate(axes.flat):
        if k >= len(target.classes):
            axis.axis("off")
            continue
        real, claimed = (np.stack([mask[:, k], ~mask[:, k]]).astype(int) for mask in (truth, decisions))
        _draw_table(axis, real @ claimed.T, ("with", "without"))
        axis.set_title(target.classes[k], fontsize="medium", fontweight="bold")
    figure.suptitle(f"{heading(predictions)}: confusion matrices", fontsize="medium")
    figure.supxlabel("predicted (from probability 0.5 on)", fontsize="medium")
    figure.supylabel("true (number of cases)", fontsize="medium")
    return figure


def _draw_table(axis, counts: np.ndarray, names) -> None:
    """Counts (true, predicted) with the share of each row; the diagonal is the sensitivity of the class."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    small = "medium" if len(names) <= 4 else "small" if len(names) <= WITH_SHARES else "x-small"
    turned = 0 if len(names) <= 3 and max(map(len, names)) <= 12 else 90 if len(names) > WITH_SHARES else 35
    display = ConfusionMatrixDisplay(shares, display_labels=names).plot(
        ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 1}, text_kw={"fontsize": small}
    )
    for (row, column), text in np.ndenumerate(display.text_):
        with_share = len(names) <= WITH_SHARES and totals[row, 0]
        text.set_text(f"{counts[row, column]}" + (f"\n{shares[row, column]:.0%}" if with_share else ""))
        text.set_color("white" if shares[row, column] > DARK else "black")
    axis.set_xticklabels(names, rotation=turned, ha="right" if 0 < turned < 90 else "center", fontsize=small)
    axis.set_yticklabels([f"{name} ({n})" for name, n in zip(names, totals[:, 0], strict=True)], fontsize=small)
    axis.set(xlabel="", ylabel="")
