"""The picture of classifiers compared: differences to the first run with their intervals."""

from pathlib import Path

import numpy as np

from nnssl_plugin.io.figures import COLOURS
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.tasks.classification.comparison import ClassComparison, compared_measures
from nnssl_plugin.tasks.classification.summary import CONFIDENCE

LOWER_IS_BETTER = ("brier", "ece", "mean_absolute_error")
SHOWN = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "brier": "Brier score",
    "ece": "calibration error",
    "quadratic_kappa": "quadratic kappa",
    "mean_absolute_error": "mean absolute error",
}


def draw_class_comparison(comparison: ClassComparison, path: str | Path) -> None:
    """One line per measure and a colour per run; right of zero the run is better, in measures of error as well.

    Args:
        comparison: of two or more runs.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measures, runs = compared_measures(comparison.target), list(comparison.differences)
    figure, axis = plt.subplots(
        figsize=(8.5, 2 + 0.3 * len(measures) * max(1.0, 0.6 * len(runs))), layout="constrained"
    )
    offsets = np.linspace(-0.25, 0.25, len(runs)) if len(runs) > 1 else [0.0]
    for number, (run, offset) in enumerate(zip(runs, offsets, strict=True)):
        _draw_run(axis, comparison, run, measures, offset, COLOURS[(number + 1) % len(COLOURS)])
    axis.axvline(0, color="black", linewidth=1, zorder=0)
    axis.set_yticks(range(len(measures)), [_shown(measure) for measure in measures])
    axis.set_ylim(len(measures) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(
        f"gain over {comparison.first} → better\n(bar: {CONFIDENCE:.0%} interval over subjects; "
        "errors are drawn with their sign changed)",
        fontsize="small",
    )
    compared = f"{runs[0]} against {comparison.first}" if len(runs) == 1 else f"against {comparison.first}"
    axis.set_title(
        f"{comparison.target.name}: {compared}, {comparison.cases} cases of {comparison.subjects} subjects",
        fontsize="medium",
    )
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _draw_run(axis, comparison: ClassComparison, run: str, measures: list[str], offset: float, colour: str) -> None:
    """Dots with intervals; the p where there is one, at the right edge."""
    for row, measure in enumerate(measures):
        found = comparison.differences[run][measure]
        if found.value is None:
            continue
        sign = -1 if measure in LOWER_IS_BETTER else 1
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


def _shown(measure: str) -> str:
    name, _, of_class = measure.partition("/")
    return f"{SHOWN[name]} of {of_class}" if of_class else SHOWN[name]
