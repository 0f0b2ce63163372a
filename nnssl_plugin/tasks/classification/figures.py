"""Pictures of a classifier, in a clinician's words: ROC, precision and recall, confusion, reliability."""

from collections.abc import Mapping
from pathlib import Path

from nnssl_plugin.io.figures import pyplot, save_figure
from nnssl_plugin.tasks.classification.confusion_figure import draw_confusion
from nnssl_plugin.tasks.classification.curves import Interval, draw_precision, draw_roc
from nnssl_plugin.tasks.classification.predictions import Predictions
from nnssl_plugin.tasks.classification.reliability_figure import draw_reliability


def draw_class_figures(
    folder: str | Path, predictions: Predictions, intervals: Mapping[str, Interval], *, suffix: str = ""
) -> None:
    """Write ``roc.png``, ``precision_recall.png``, ``reliability.png`` and ``confusion.png``.

    Args:
        folder: where to.
        predictions: with their labels.
        intervals: metric → [low, high], as ``summary.json`` holds them.
        suffix: goes before ``.png``.
    """
    plt = pyplot()
    folder = Path(folder)
    for name, draw in (("roc", draw_roc), ("precision_recall", draw_precision), ("reliability", draw_reliability)):
        figure, axis = plt.subplots(layout="constrained")
        lines = draw(axis, predictions, intervals)
        figure.set_size_inches(7, 7.1 + 0.2 * len(lines))
        figure.legend(handles=lines, loc="outside lower center", fontsize="small", frameon=False)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.grid(alpha=0.3)
        save_figure(figure, folder / f"{name}{suffix}.png", dpi=110)
    save_figure(draw_confusion(predictions), folder / f"confusion{suffix}.png", dpi=110)
