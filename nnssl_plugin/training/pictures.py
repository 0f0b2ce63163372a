"""Draws volumes as titled images beside each other: grey, coloured, or with values and a mark over them."""

import math
import textwrap
from collections.abc import Sequence
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


INCHES = 3.0
"""Longest side of a slice; all slices of a file have one scale."""
SMALLEST = 0.5
"""Inches that a thin slice is given at least."""
TITLE = 10
"""Points of a title, whatever another program in this process has set: columns are as wide as titles need."""


def draw_pictures(
    images: list[tuple[str, Tensor | Overlay | Colours]],
    path: str | Path,
    spacing: Sequence[float] | None = None,
    letters: Sequence[str] | None = None,
) -> None:
    """Titled images beside each other: the three central slices of a volume (D, H, W), or the image (H, W) itself.

    All show the same slices: those through the first mark, where an image has one. Grey values share the intensity
    range of the first, so that they can be compared. The patient's right is on the left, as radiologists see it.

    Args:
        images: title and picture.
        path: the PNG to write.
        spacing: mm per voxel along each axis; ``None`` for cubic voxels.
        letters: where each axis begins and ends, such as ``("IS", "PA", "LR")``; ``None`` where it is not known. An
            image (H, W) takes the last two, as nnU-Net's 2D slices do.
    """
    shown = [(title, _Shown(image)) for title, image in images]
    size = shown[0][1].size
    spacing = [1.0] * len(size) if spacing is None else list(spacing)[-len(size) :]
    mark = next((each.mark for _, each in shown if each.mark is not None), None)
    point = [extent // 2 for extent in size] if mark is None else [round(place) for place in mark]
    cuts = [{axis: point[axis]} for axis in range(3)] if len(size) == 3 else [{}]
    axes = [[axis for axis in range(len(size)) if axis not in cut] for cut in cuts]  # up, across
    page = _Page(
        [[size[axis] * spacing[axis] for axis in pair] for pair in axes],
        titles=[title for title, _ in shown],
        letters=letters is not None,
        bar=any(each.values is not None for _, each in shown),
    )
    grey = _grey(shown[0][1].image)
    for row, (cut, (up, across)) in enumerate(zip(cuts, axes, strict=True)):
        for column, (_, each) in enumerate(shown):
            panel = page.panel(row, column)
            drawn = each.draw(panel, cut, grey, aspect=spacing[up] / spacing[across])
            if row == 0:
                panel.set_title(page.titles[column], fontsize=TITLE)
            if letters is not None:
                ends = letters[-len(size) :]
                _orient(panel, ends[up], ends[across], labelled=column == 0)
            if row == 0 and each.values is not None:
                page.figure.colorbar(drawn, cax=page.bar())
    save_figure(page.figure, path)


class _Page:
    """A figure on which all slices have one scale. Lengths are in inches.

    Args:
        sides: height and width in mm of the slices of each row.
        titles: of the columns; long ones are wrapped, and columns are as wide as the longest word.
        letters: whether there is room for letters on the left and below.
        bar: whether there is room for a colour bar on the right.
    """

    GAP, LINE, BAR = 0.08, 0.17, 0.9
    PER_INCH = 12
    """Characters of a title."""

    def __init__(self, sides: Sequence[Sequence[float]], *, titles: Sequence[str], letters: bool, bar: bool):
        scale = INCHES / max(max(pair) for pair in sides)
        self.heights = [max(SMALLEST, up * scale) for up, _ in sides]
        longest = max((len(word) for title in titles for word in title.split()), default=0) / self.PER_INCH
        self.column = max(SMALLEST, longest, max(across for _, across in sides) * scale)
        self.titles = [textwrap.fill(title, math.ceil(self.column * self.PER_INCH)) for title in titles]
        self.title = 0.13 + self.LINE * max(title.count("\n") + 1 for title in self.titles)
        self.left, self.below = (0.3, 0.28) if letters else (0.03, 0.03)
        right = self.BAR if bar else 0.05
        self.width = self.left + len(titles) * self.column + (len(titles) - 1) * self.GAP + right
        self.height = self.title + sum(self.heights) + len(sides) * self.below
        self.figure = pyplot().figure(figsize=(self.width, self.height))

    def panel(self, row: int, column: int):
        """The axes of a slice."""
        start = self.left + column * (self.column + self.GAP)
        bottom = self.height - self.title - sum(self.heights[: row + 1]) - row * self.below
        panel = self._axes(start, bottom, self.column, self.heights[row])
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        return panel

    def bar(self):
        """The axes of a colour bar."""
        return self._axes(self.width - 0.75, 0.15 * self.height, 0.15, 0.7 * self.height)

    def _axes(self, left: float, bottom: float, width: float, height: float):
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))


def _grey(image: np.ndarray) -> dict:
    """How grey values are drawn: the intensity range of an image, outliers and what is not finite left out."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    return {"cmap": "gray", "vmin": low, "vmax": high if high > low else low + 1}


def _orient(panel, up: str, across: str, *, labelled: bool) -> None:
    """Right on the left, head at the top, face at the top or on the right; and letters that say so."""
    if across == "LR":
        panel.invert_xaxis()
        across = "RL"
    if up in ("SI", "AP"):
        panel.invert_yaxis()
        up = up[::-1]
    if labelled:
        panel.set_xlabel(" – ".join(across), fontsize="small", labelpad=3)
        panel.set_ylabel(" – ".join(up), fontsize="small", labelpad=3)


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

    def draw(self, axis, cut: dict[int, int], grey: dict, *, aspect: float):
        """Draw the slice ``cut`` (axis → index) of this picture, and return what was drawn last."""
        look = {"origin": "lower", "aspect": aspect, "interpolation": "nearest"}
        drawn = axis.imshow(_cut(self.image, cut), **look, **({} if self.coloured else grey))
        if self.values is not None:
            drawn = axis.imshow(_cut(self.values, cut), **look, cmap=HEAT, vmin=-1, vmax=1, alpha=0.6)
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
