"""What a person looks at while a method trains: progress.png and the method's own pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nnssl_plugin.files import atomic_path

Panel = tuple[str, Callable[[str], bool]]
"""Title, and which logged series it shows."""
PANELS: tuple[Panel, ...] = (
    ("Loss (solid: training, dashed: validation)", lambda k: k in ("train_losses", "val_losses")),
    ("Terms of the loss", lambda k: k.startswith(("train/", "val/"))),
    ("Learning rate", lambda k: k == "lrs"),
    ("Spread of the features (0 = collapsed)", lambda k: k in ("feature_std", "effective_rank")),
    ("Seconds per epoch", lambda k: k in ("seconds_waiting", "seconds_computing")),
    ("Diagnostics", lambda k: k.startswith("diagnostics/")),
    ("Skipped steps", lambda k: k == "skipped_steps"),
    ("Peak memory (GiB)", lambda k: k == "peak_memory_gib"),
)
"""Of a pretraining."""


def draw_progress(history: dict[str, list], path: str | Path, *, panels: Sequence[Panel] = PANELS) -> None:
    """One picture of everything that is logged per epoch.

    Args:
        history: name → one number per epoch.
        path: the PNG to write.
        panels: an even number of them, two to a row.
    """
    plt = _pyplot()
    from matplotlib.ticker import MaxNLocator

    series = {k: np.asarray(v, dtype=float) for k, v in history.items() if len(v) and np.ndim(v[0]) == 0}
    rows = len(panels) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(15, 4.25 * rows))
    figure.subplots_adjust(0.06, 0.16 / rows, 0.98, 1 - 0.12 / rows, hspace=0.35, wspace=0.15)
    for axis, (title, belongs) in zip(axes.flat, panels, strict=True):
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
    _save(figure, path)


def draw_pictures(images: list[tuple[str, Tensor]], path: str | Path) -> None:
    """Titled images beside each other: the three central slices of a volume (D, H, W), or the image (H, W) itself.

    All share the intensity range of the first, so that they can be compared.
    """
    plt = _pyplot()
    arrays = [(title, image.detach().float().cpu().numpy()) for title, image in images]
    low, high = np.nanpercentile(arrays[0][1], (0.5, 99.5))
    rows = 3 if arrays[0][1].ndim == 3 else 1
    figure, axes = plt.subplots(rows, len(arrays), figsize=(3 * len(arrays), 3 * rows), squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.95, hspace=0.03, wspace=0.03)
    for column, (title, array) in enumerate(arrays):
        axes[0, column].set_title(title)
        for row in range(rows):
            shown = array if rows == 1 else np.take(array, array.shape[row] // 2, axis=row)
            axes[row, column].imshow(shown, cmap="gray", vmin=low, vmax=high if high > low else None, origin="lower")
            axes[row, column].axis("off")
    _save(figure, path)


def _save(figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


