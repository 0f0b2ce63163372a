"""What a person looks at while a method trains: progress.png and the method's own pictures."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nnssl_plugin.files import atomic_path
from nnssl_plugin.pretext import Colours, Overlay

Panel = tuple[str, Callable[[str], bool]]
"""Title, and which logged series it shows."""
SEPARATION = ("diagnostics/silhouette", "diagnostics/cosine_gap")
ELSEWHERE = (*SEPARATION, "diagnostics/token_std")
"""Diagnostics with a panel of another kind."""
PANELS: tuple[Panel, ...] = (
    ("Loss (solid: training, dashed: validation)", lambda k: k in ("train_losses", "val_losses")),
    ("Terms of the loss", lambda k: k.startswith(("train/", "val/"))),
    ("Learning rate", lambda k: k == "lrs"),
    ("Spread of the features (0 = collapsed)", lambda k: k in ("feature_std", "diagnostics/token_std")),
    ("Effective rank of the features", lambda k: k == "effective_rank"),
    ("Seconds per epoch", lambda k: k in ("seconds_waiting", "seconds_computing")),
    ("Diagnostics", lambda k: k.startswith("diagnostics/") and not k.startswith(ELSEWHERE)),
    ("Structures told apart (by labels)", lambda k: k.startswith(SEPARATION)),
    ("Skipped steps", lambda k: k == "skipped_steps"),
    ("Peak memory (GiB)", lambda k: k == "peak_memory_gib"),
)
"""Of a pretraining."""
HEAT = "PuOr"
"""Colours of values in [-1, 1]: purple and orange, which colour-blind readers tell apart."""


def draw_progress(history: dict[str, list], path: str | Path, *, panels: Sequence[Panel] = PANELS) -> None:
    """One picture of everything that is logged per epoch.

    Args:
        history: name → one number per epoch.
        path: the PNG to write.
        panels: two to a row; those without a series are left out.
    """
    plt = _pyplot()
    from matplotlib.ticker import MaxNLocator

    series = {k: np.asarray(v, dtype=float) for k, v in history.items() if len(v) and np.ndim(v[0]) == 0}
    panels = [(title, belongs) for title, belongs in panels if any(map(belongs, series))]
    rows = max(1, math.ceil(len(panels) / 2))
    figure, axes = plt.subplots(rows, 2, figsize=(15, 4.25 * rows), squeeze=False)
    figure.subplots_adjust(0.06, 0.16 / rows, 0.98, 1 - 0.12 / rows, hspace=0.35, wspace=0.15)
    for axis in axes.flat[len(panels):]:
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
    _save(figure, path)


def draw_pictures(images: list[tuple[str, Tensor | Overlay | Colours]], path: str | Path) -> None:
    """Titled images beside each other: the three central slices of a volume (D, H, W), or the image (H, W) itself.

    All show the same slices: those through the first mark, where an image has one. Grey values share the intensity
    range of the first, so that they can be compared.
    """
    plt = _pyplot()
    shown = [(title, _Shown(image)) for title, image in images]
    low, high = np.nanpercentile(shown[0][1].image, (0.5, 99.5))
    grey = {"cmap": "gray", "vmin": low, "vmax": high if high > low else None}
    size = shown[0][1].size
    mark = next((each.mark for _, each in shown if each.mark is not None), None)
    point = [extent // 2 for extent in size] if mark is None else [round(place) for place in mark]
    cuts = [{axis: point[axis]} for axis in range(3)] if len(size) == 3 else [{}]
    bar = 0.9 if any(each.values is not None for _, each in shown) else 0.03  # inches on the right
    width, height = 3 * len(shown) + bar, 3 * len(cuts) + 0.3
    figure, axes = plt.subplots(len(cuts), len(shown), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 1 - bar / width, 1 - 0.3 / height, hspace=0.03, wspace=0.03)
    for column, (title, each) in enumerate(shown):
        axes[0, column].set_title(title)
        for row, cut in enumerate(cuts):
            drawn = each.draw(axes[row, column], cut, grey)
            axes[row, column].axis("off")
        if each.values is not None:
            figure.colorbar(drawn, cax=figure.add_axes((1 - 0.75 / width, 0.15, 0.15 / width, 0.7)))
    _save(figure, path)


class _Shown:
    """One picture as arrays."""

    def __init__(self, picture: Tensor | Overlay | Colours):
        picture = Overlay(picture) if isinstance(picture, Tensor) else picture
        self.image = _array(picture.image)
        self.coloured = isinstance(picture, Colours)
        self.size = self.image.shape[:-1] if self.coloured else self.image.shape
        values = None if self.coloured else picture.values
        self.values = None if values is None else _array(values)
        self.mark = None if self.coloured else picture.mark

    def draw(self, axis, cut: dict[int, int], grey: dict):
        """Draw the slice ``cut`` (axis → index) of this picture, and return what was drawn last."""
        drawn = axis.imshow(_cut(self.image, cut), origin="lower", **({} if self.coloured else grey))
        if self.values is not None:
            drawn = axis.imshow(_cut(self.values, cut), origin="lower", cmap=HEAT, vmin=-1, vmax=1, alpha=0.6)
        if self.mark is not None:
            y, x = (place for number, place in enumerate(self.mark) if number not in cut)
            axis.plot(x, y, "o", markersize=8, markerfacecolor="none", markeredgecolor="black", markeredgewidth=4)
            axis.plot(x, y, "o", markersize=8, markerfacecolor="none", markeredgecolor="white", markeredgewidth=2)
        return drawn


def _array(image: Tensor) -> np.ndarray:
    return image.detach().float().cpu().numpy()


def _cut(array: np.ndarray, cut: dict[int, int]) -> np.ndarray:
    for axis, index in cut.items():
        array = np.take(array, index, axis=axis)
    return array


def _save(figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


