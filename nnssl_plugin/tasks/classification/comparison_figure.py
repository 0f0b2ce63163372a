"""The picture of classifiers compared: differences to the first run with their intervals."""

from pathlib import Path

import numpy as np

from nnssl_plugin.io.figures import COLOURS, pyplot, save_figure
from nnssl_plugin.tasks.classification.checkpoints import BEST, TOO_GOOD
from nnssl_plugin.tasks.classification.comparison import ClassComparison, compared_metrics
from nnssl_plugin.tasks.classification.metrics import metric_of, metric_title
from nnssl_plugin.tasks.classification.summary import CONFIDENCE


def draw_class_comparison(comparison: ClassComparison, path: str | Path) -> None:
    """One line per metric and a colour per run; right of zero the run is better, in metrics of error as well.

    Args:
        comparison: of two or more runs.
        path: the PNG to write.
    """
    metrics, runs = compared_metrics(comparison.target), list(comparison.differences)
    figure, axis = pyplot().subplots(
        figsize=(8.5, 2 + 0.3 * len(metrics) * max(1.0, 0.6 * len(runs))), layout="constrained"
    )
    offsets = np.linspace(-0.25, 0.25, len(runs)) if len(runs) > 1 else [0.0]
    for number, (run, offset) in enumerate(zip(runs, offsets, strict=True)):
        _draw_run(axis, comparison, run, metrics, offset, COLOURS[(number + 1) % len(COLOURS)])
    axis.axvline(0, color="black", linewidth=1, zorder=0)
    axis.set_yticks(range(len(metrics)), [metric_title(metric) for metric in metrics])
    axis.set_ylim(len(metrics) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(
        f"gain over {comparison.first} → better\n(bar: {CONFIDENCE:.0%} interval over subjects; "
        "errors are drawn with their sign changed)",
        fontsize="small",
    )
    compared = f"{runs[0]} against {comparison.first}" if len(runs) == 1 else f"against {comparison.first}"
    best = [run for run, checkpoint in comparison.checkpoints.items() if checkpoint == BEST]
    remark = f"\n{', '.join(best)}: {TOO_GOOD}" if best else ""
    axis.set_title(
        f"{comparison.target.name}: {compared}, {comparison.cases} cases of {comparison.subjects} subjects{remark}",
        fontsize="medium",
    )
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    save_figure(figure, path, dpi=110)


def _draw_run(axis, comparison: ClassComparison, run: str, metrics: list[str], offset: float, colour: str) -> None:
    """Dots with intervals; the p where there is one, at the right edge."""
    for row, metric in enumerate(metrics):
        found = comparison.differences[run][metric]
        if found.value is None:
            continue
        sign = -1 if metric_of(metric).lower_is_better else 1
        reach = None if found.low is None else np.abs([[found.value - found.low], [found.high - found.value]])
        if reach is not None and sign < 0:
            reach = reach[::-1]
        axis.errorbar(
            sign * found.value,
            row + offset,
            xerr=reach,
            fmt="o",
            markersize=5,
            capsize=3,
            color=colour,
            label=run if row == 0 else None,
        )
        if found.p is not None:
            axis.annotate(
                f"p = {found.p:.2g}",
                (1, row + offset),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
                color=colour,
            )
