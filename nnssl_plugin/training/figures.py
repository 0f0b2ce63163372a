"""progress.png: everything that a training logs per epoch, in one picture."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nnssl_plugin.io.figures import pyplot, save_figure

Panel = tuple[str, Callable[[str], bool]]
"""Title, and which logged series it shows."""
SEPARATION = ("diagnostics/silhouette", "diagnostics/cosine_gap")
RETRIEVAL = "diagnostics/retrieval_"
ELSEWHERE = (*SEPARATION, RETRIEVAL, "diagnostics/token_std")
"""Diagnostics with a panel of another kind."""
PANELS: tuple[Panel, ...] = (
    ("Loss (solid: training, dashed: validation)", lambda k: k in ("train_losses", "val_losses")),
    ("Terms of the loss", lambda k: k.startswith(("train/", "val/"))),
    ("Learning rate", lambda k: k == "lrs"),
    ("Spread of the features (0 = collapsed)", lambda k: k in ("feature_std", "diagnostics/token_std")),
    ("Effective rank of the features", lambda k: k == "effective_rank"),
    ("Seconds per epoch", lambda k: k in ("seconds_waiting", "seconds_computing")),
    ("Diagnostics", lambda k: k.startswith("diagnostics/") and not k.startswith(ELSEWHERE)),
    ("Retrieval; with another case or an empty volume it must stay at chance", lambda k: k.startswith(RETRIEVAL)),
    ("Structures told apart (by labels)", lambda k: k.startswith(SEPARATION)),
    ("Skipped steps", lambda k: k == "skipped_steps"),
    ("Peak memory (GiB)", lambda k: k == "peak_memory_gib"),
)
"""Of a pretraining."""


def draw_progress(history: dict[str, list], path: str | Path, *, panels: Sequence[Panel] = PANELS) -> None:
    """One picture of everything that is logged per epoch.

    Args:
        history: name → one number per epoch.
        path: the PNG to write.
        panels: two to a row; those without a series are left out.
    """
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    series = {k: np.asarray(v, dtype=float) for k, v in history.items() if len(v) and np.ndim(v[0]) == 0}
    panels = [(title, belongs) for title, belongs in panels if any(map(belongs, series))]
    rows = max(1, math.ceil(len(panels) / 2))
    figure, axes = plt.subplots(rows, 2, figsize=(15, 4.25 * rows), squeeze=False)
    figure.subplots_adjust(0.06, 0.16 / rows, 0.98, 1 - 0.12 / rows, hspace=0.35, wspace=0.15)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, belongs) in zip(axes.flat, panels, strict=False):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        colours: dict[str, str] = {}  # a term has one colour in training and validation
        for name in filter(belongs, series):
            term = name.split("/")[-1]
            validation = name.startswith("val")
            (line,) = axis.plot(
                series[name],
                "--" if validation else "-",
                marker="." if len(series[name]) < 40 else "",
                color=colours.get(term),
                label=f"{term} (validation)" if name.startswith("val/") else term,
            )
            colours[term] = line.get_color()
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.margins(y=0.1)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    save_figure(figure, path)
