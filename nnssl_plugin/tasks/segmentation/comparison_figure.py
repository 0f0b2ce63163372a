"""The picture of a comparison: every case in every run, and the mean differences with their intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnssl_plugin.io.figures import COLOURS, pyplot, save_figure
from nnssl_plugin.tasks.segmentation.metrics import DICE
from nnssl_plugin.tasks.segmentation.summaries import (
    CONFIDENCE,
    FOREGROUND_MEAN,
    CaseScores,
    Comparison,
    case_scores,
    counted,
)

COLUMNS = 4


def draw_comparison(by_run: Mapping[str, Sequence[CaseScores]], comparison: Comparison, path: str | Path) -> None:
    """One panel per label with the cases' Dice in every run, and the mean differences to the first run.

    Args:
        by_run: scores of every run, the first one being what the others are compared to.
        comparison: of these runs.
        path: the PNG to write.
    """
    plt = pyplot()
    labels = list(next(iter(comparison.differences.values())))
    labels = labels[:1] if len(labels) == 2 else labels  # the mean of one label is that label
    columns = min(COLUMNS, len(labels))
    rows = math.ceil(len(labels) / columns)
    forest_height = 1.4 + 0.25 * len(labels) * max(1.0, 0.6 * len(comparison.differences))
    figure = plt.figure(figsize=(max(9.0, 2.9 * columns), 3.2 * rows + forest_height + 0.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.2 * rows, forest_height + 0.4])
    figure.suptitle(f"{counted(comparison)}, one line per case; black bar and number above: mean")
    axes = above.subplots(rows, columns, squeeze=False)
    for axis, label in zip(axes.flat, labels, strict=False):
        _draw_cases(axis, by_run, label, comparison.cases)
    for axis in axes.flat[len(labels) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("Dice of a case")
    _draw_differences(below.subplots(1, len(comparison.metrics), sharey=True, squeeze=False)[0], labels, comparison)
    if len(comparison.differences) > 1:
        below.legend(
            *below.axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(comparison.differences),
            frameon=False,
        )
    save_figure(figure, path, dpi=110)


def _draw_cases(axis, by_run: Mapping[str, Sequence[CaseScores]], label: str, cases: Sequence[str]) -> None:
    """A line per case through its Dice in every run; a bar at each run's mean over the cases that all runs score."""
    dice = np.stack([case_scores(run, label, DICE.name, cases=cases) for run in by_run.values()])
    dice = dice[:, ~np.isnan(dice).any(axis=0)]
    positions = np.arange(len(by_run))
    axis.plot(positions, dice, color="0.75", linewidth=0.8, zorder=1)
    for position, (values, colour) in enumerate(zip(dice, _colours(len(by_run)), strict=True)):
        axis.scatter(np.full(len(values), position), values, s=14, color=colour, alpha=0.7, linewidths=0, zorder=2)
        if len(values):
            axis.plot([position - 0.22, position + 0.22], [values.mean()] * 2, color="black", linewidth=2, zorder=3)
            axis.annotate(
                f"{values.mean():.3f}",
                (position, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
    axis.set_title(_shown(label), pad=18, fontsize="medium", fontweight="bold")
    axis.set_xticks(positions, list(by_run), rotation=0 if len(by_run) < 4 else 30, fontsize="small")
    axis.set_xlim(-0.5, len(by_run) - 0.5)
    axis.grid(axis="y", alpha=0.3)
    if not dice.size:
        axis.text(0.5, 0.5, "in no case", transform=axis.transAxes, ha="center")


def _draw_differences(axes, labels: Sequence[str], comparison: Comparison) -> None:
    """Per metric and label: mean difference to the first run with its interval, a colour per run."""
    runs = list(comparison.differences)
    offsets = np.linspace(-0.22, 0.22, len(runs)) if len(runs) > 1 else [0.0]
    for axis, metric in zip(axes, comparison.metrics, strict=True):
        for run, colour, offset in zip(runs, _colours(len(runs) + 1)[1:], offsets, strict=True):
            found = [comparison.differences[run][label][metric.name] for label in labels]
            means = np.array([interval.mean for interval in found])
            reach = np.array([[i.mean - i.low for i in found], [i.high - i.mean for i in found]])
            axis.errorbar(
                means,
                np.arange(len(labels)) + offset,
                xerr=reach,
                fmt="o",
                markersize=5,
                capsize=3,
                color=colour,
                label=run,
            )
        axis.axvline(0, color="black", linewidth=1, zorder=0)
        compared = f"{runs[0]} − {comparison.first}" if len(runs) == 1 else f"difference to {comparison.first}"
        axis.set_title(f"{metric.title}: {compared}", fontsize="medium", fontweight="bold")
        better = "← better" if metric.lower_is_better else "better →"
        axis.set_xlabel(f"mean, {CONFIDENCE:.0%} interval over subjects\n{better}", fontsize="small")
        axis.grid(axis="x", alpha=0.3)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(np.arange(len(labels)), [_shown(label) for label in labels])
    axes[0].set_ylim(len(labels) - 0.5, -0.5)


def _colours(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def _shown(label: str) -> str:
    return "mean of labels" if label == FOREGROUND_MEAN else label
