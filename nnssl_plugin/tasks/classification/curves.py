"""ROC and precision-recall curves, one per class against the rest, drawn by scikit-learn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

from nnssl_plugin.io.figures import COLOURS
from nnssl_plugin.nnunet.case_labels import BINARY
from nnssl_plugin.statistics.areas import areas
from nnssl_plugin.tasks.classification.checkpoints import BEST
from nnssl_plugin.tasks.classification.metrics import indicators
from nnssl_plugin.tasks.classification.predictions import Predictions, predicted_labels

GREY = "0.78"
Interval = Sequence[float | None]
"""[low, high], or [None, None]."""


@dataclass(frozen=True)
class _Curve:
    name: str
    colour: str
    positives: np.ndarray  # (N,) bool
    scores: np.ndarray  # (N,) probability of the class
    area: float

    @property
    def style(self) -> dict:
        return {
            "color": self.colour,
            **({"linewidth": 1, "zorder": 1} if self.colour == GREY else {"linewidth": 2, "zorder": 2}),
        }


def draw_roc(axis, predictions: Predictions, intervals: Mapping[str, Interval]) -> list:
    """Draw the curves; returns what goes into the legend, where each area has its interval."""
    curves = list(_curves(predictions, "auroc"))
    for curve in curves:
        label = _label(curve, "AUROC", intervals.get(f"auroc/{curve.name}"))
        RocCurveDisplay.from_predictions(
            curve.positives,
            curve.scores,
            drop_intermediate=False,
            ax=axis,
            curve_kwargs={"label": label, **curve.style},
        )
    _name_the_rest(axis, curves, "AUROC")
    axis.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="chance: AUROC 0.5")
    if predictions.target.kind == BINARY and curves:
        _mark_operating_point(axis, predictions)
    axis.set_title(f"{heading(predictions)}: how well it tells apart")
    axis.set_xlabel("1 − specificity (share of cases without it that raise an alarm)")
    axis.set_ylabel("sensitivity (share of cases with it that are found)")
    return legend_entries(axis)


def draw_precision(axis, predictions: Predictions, intervals: Mapping[str, Interval]) -> list:
    """Draw the curves, and each class's share of the cases as a dotted line; returns what goes into the legend.

    The area below the steps is the average precision.
    """
    curves = list(_curves(predictions, "average_precision"))
    for curve in curves:
        label = _label(curve, "average precision", intervals.get(f"average_precision/{curve.name}"))
        PrecisionRecallDisplay.from_predictions(
            curve.positives, curve.scores, ax=axis, curve_kwargs={"label": label, **curve.style}
        )
        if curve.colour != GREY:
            axis.axhline(curve.positives.mean(), color=curve.colour, linestyle=":", linewidth=1)
    _name_the_rest(axis, curves, "average precision")
    axis.plot([], [], color="0.5", linestyle=":", linewidth=1, label="chance: the share of cases with it")
    axis.set_title(f"{heading(predictions)}: how far an alarm can be believed")
    axis.set_xlabel("sensitivity, or recall (share of cases with it that are found)")
    axis.set_ylabel("positive predictive value, or precision\n(share of alarms that are right)")
    return legend_entries(axis)


def colours_of_classes(predictions: Predictions) -> dict[int, str]:
    """Class index → colour: all classes, or where there are more than seven the six with the lowest AUROC."""
    aurocs = _areas(predictions)["auroc"]
    number = len(aurocs)
    chosen = range(number) if number <= len(COLOURS) else np.argsort(aurocs)[: len(COLOURS) - 1]
    return dict(zip(map(int, chosen), COLOURS, strict=False))


def heading(predictions: Predictions) -> str:
    """Of what and from how many cases and subjects a figure is."""
    cases, subjects = len(predictions.cases), len(set(predictions.subjects))
    counted = f"{cases} case{'s' * (cases > 1)}"
    of = f" of {subjects} subjects" if subjects < cases else ""
    return f"{predictions.target.name}, {counted}{of}" + (", best epoch" if predictions.checkpoint == BEST else "")


def legend_entries(axis) -> list:
    """What an axis would name in a legend, which scikit-learn has drawn into it; here it goes below the figure."""
    if axis.get_legend() is not None:
        axis.get_legend().remove()
    return axis.get_legend_handles_labels()[0]


def bracket(interval: Interval | None) -> str:
    """An interval as a legend shows it; empty where there is none."""
    return "" if not interval or interval[0] is None else f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})"


def _curves(predictions: Predictions, metric: str) -> Iterator[_Curve]:
    """Of every class that some cases have and some lack; of a binary target only the second."""
    target, colours = predictions.target, colours_of_classes(predictions)
    truth, values = indicators(predictions.labels, target), _areas(predictions)[metric]
    for k, name in enumerate(target.classes):
        if (target.kind == BINARY and k == 0) or truth[:, k].all() or not truth[:, k].any():
            continue
        yield _Curve(
            name,
            COLOURS[0] if target.kind == BINARY else colours.get(k, GREY),
            truth[:, k],
            predictions.probabilities[:, k],
            float(values[k]),
        )


def _areas(predictions: Predictions) -> dict[str, np.ndarray]:
    truth, once = indicators(predictions.labels, predictions.target), np.ones((1, len(predictions.labels)))
    found = [areas(predictions.probabilities[:, k], truth[:, k], once) for k in range(truth.shape[1])]
    return {name: np.array([pair[i][0] for pair in found]) for i, name in enumerate(("auroc", "average_precision"))}


def _label(curve: _Curve, shown: str, interval: Interval | None) -> str | None:
    if curve.colour == GREY:
        return None
    counts = f"{curve.positives.sum()} of {len(curve.positives)} cases"
    return f"{curve.name}: {shown} {curve.area:.3f}{bracket(interval)}, {counts}"


def _name_the_rest(axis, curves: Sequence[_Curve], shown: str) -> None:
    rest = [curve.area for curve in curves if curve.colour == GREY]
    if rest:
        axis.plot(
            [],
            [],
            color=GREY,
            linewidth=1,
            label=f"{len(rest)} other classes: {shown} {min(rest):.3f} to {max(rest):.3f}",
        )
    if not curves:
        axis.text(0.5, 0.5, "not defined: all cases have one class", ha="center")


def _mark_operating_point(axis, predictions: Predictions) -> None:
    """Where the predicted classes lie on the curve, with the counts behind it."""
    positives = predictions.labels == 1
    alarms = predicted_labels(predictions.probabilities, predictions.target) == 1
    found, spared = int((positives & alarms).sum()), int((~positives & ~alarms).sum())
    sensitivity, specificity = found / positives.sum(), spared / (~positives).sum()
    axis.plot(
        1 - specificity,
        sensitivity,
        "o",
        color="black",
        markersize=7,
        zorder=3,
        label=f"at probability 0.5: sensitivity {sensitivity:.2f} ({found} of {positives.sum()}), "
        f"specificity {specificity:.2f} ({spared} of {(~positives).sum()})",
    )
