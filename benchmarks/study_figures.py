"""Figures of a study: Dice against the number of labelled cases, and learning curves."""

from pathlib import Path
from typing import Any

import numpy as np
from study_file import Study
from study_results import ALL_LABELS, LOOKS, Run, labelled_cases

from nnssl_plugin.io.files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255")
"""Okabe and Ito's palette, which colour-blind readers tell apart, with a grey and a dark red."""
MARKERS = "os^Dv*PXd"


def draw_label_efficiency(study: Study, runs: list[Run], rows: list[dict[str, Any]], path: Path) -> None:
    """Mean Dice of each arm over the number of labelled cases; bands are intervals over seeds and cases."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for number, arm in enumerate(study.arms):
        own = [row for row in rows if (row["arm"], row["label"], row["look"]) == (arm.name, ALL_LABELS, LOOKS["dice"])]
        if not own:
            continue
        cases = [row["labelled_cases"] for row in own]
        bounds = [
            [row["mean"] if row["interval"][side] is None else row["interval"][side] for row in own]
            for side in ("low", "high")
        ]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axis.plot(
            cases, [row["mean"] for row in own], color=colour, linewidth=2, marker=marker, markersize=8, label=arm.name
        )
        axis.fill_between(cases, *bounds, color=colour, alpha=0.15, linewidth=0)
        if len(study.seeds) > 1:
            points = [(row["labelled_cases"], value) for row in own for value in row["per_seed"].values()]
            axis.plot(
                *zip(*points, strict=True), linestyle="", marker=marker, markersize=5, color=colour, fillstyle="none"
            )
    counts = [labelled_cases(study, fraction) for fraction in _finished(study, runs)]
    axis.set_xticks(sorted(set(counts)))
    axis.set_xlabel("labelled training cases")
    axis.set_ylabel(f"mean Dice, {study.cases.evaluation} evaluation cases")
    seeds = "; small: each seed" if len(study.seeds) > 1 else ""
    axis.set_title(f"{study.name}\nband: 95 % interval over seeds and cases{seeds}", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(loc="best")
    save(figure, path)


def draw_learning(study: Study, runs: list[Run], path: Path) -> None:
    """nnU-Net's pseudo Dice per epoch, a panel for each fraction; thick lines are means over the seeds."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    fractions = _finished(study, runs)
    figure, axes = plt.subplots(
        1,
        len(fractions),
        figsize=(1 + 3.8 * len(fractions), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, fraction in zip(axes[0], fractions, strict=True):
        for number, arm in enumerate(study.arms):
            colour = COLOURS[number % len(COLOURS)]
            curves = [
                run.pseudo_dice for run in runs if (run.arm, run.fraction, run.schedule) == (arm.name, fraction, None)
            ]
            if not curves:
                continue
            epochs = np.arange(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(epochs, curve, color=colour, linewidth=0.8, alpha=0.5)
            axis.plot(
                epochs,
                np.mean(curves, axis=0),
                color=colour,
                linewidth=2.2,
                label=arm.name,
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
            )
        axis.set_title(f"{labelled_cases(study, fraction)} labelled cases", fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("pseudo Dice on patches")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend(loc="lower right")
    save(figure, path)


def _finished(study: Study, runs: list[Run]) -> list[float]:
    """The fractions that a study which was cut off has runs of; the first where there are none."""
    return [each for each in study.fractions if any(run.fraction == each for run in runs)] or [study.fractions[0]]


def save(figure, path: Path) -> None:
    """Write a figure and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot().close(figure)


def pyplot():
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
