"""Pictures of volumes: titled images beside each other, grey, coloured, or with values and a mark over them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from nnssl_plugin.io.figures import pyplot, save_figure


@dataclass(frozen=True)
class Overlay:
    """A grey image with something drawn over it, for :meth:`PretextTask.pictures`."""

    image: Tensor
    """(*spatial)."""
    values: Tensor | None = None
    """(*spatial) in [-1, 1], such as cosines: drawn as colours over the image, with a colour bar."""
    mark: tuple[float, ...] | None = None
    """A point to mark, in voxels of the image; all pictures of the file then show the slices through it."""


@dataclass(frozen=True)
class Colours:
    """A coloured image, for :meth:`PretextTask.pictures`."""

    image: Tensor
    """(*spatial, 3) in [0, 1]: red, green, blue."""


HEAT = "PuOr"
"""Colours of values in [-1, 1]: purple and orange, which colour-blind readers tell apart."""


def draw_pictures(images: list[tuple[str, Tensor | Overlay | Colours]], path: str | Path) -> None:
    """Titled images beside each other: the three central slices of a volume (D, H, W), or the image (H, W) itself.

    All show the same slices: those through the first mark, where an image has one. Grey values share the intensity
    range of the first, so that they can be compared.
    """
    plt = pyplot()
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
    save_figure(figure, path)


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
