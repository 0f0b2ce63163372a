"""The picture of an explanation: the image, and over it in colour what the model would miss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_plugin.data.images import Image
from nnssl_plugin.nnunet.case_labels import MULTILABEL, Target
from nnssl_plugin.nnunet.slice_positions import axes_of_planes
from nnssl_plugin.tasks.classification.explanation import Explanation

COLOURS = "PuOr_r"
"""Orange speaks for the class and purple against it; colour-blind readers can tell them apart."""
SMALLEST_RANGE = 0.1
"""Log-odds at which the colours end at least, so that a model that looks nowhere shows no colours."""


@dataclass(frozen=True)
class _View:
    """Two axes of a case as rows and columns, and whether each is turned to stand as radiologists expect."""

    name: str
    normal: int
    axes: tuple[int, int]
    turned: tuple[bool, bool] = (False, False)
    letters: tuple[str, str, str, str] = ("", "", "", "")  # left, right, top, bottom

    def cut(self, volume: np.ndarray, position: int) -> np.ndarray:
        """The slice (rows, columns) of a volume (z, y, x)."""
        plane = np.take(volume, position, axis=self.normal)
        plane = plane if self.axes[0] < self.axes[1] else plane.T
        return plane[:: -1 if self.turned[0] else 1, :: -1 if self.turned[1] else 1]


def draw_explanation(
    path: str | Path,
    case: str,
    image: Image,
    explanation: Explanation,
    *,
    target: Target,
    probabilities: np.ndarray,
    transpose_forward: Sequence[int],
) -> None:
    """Write a PNG: the slices with the most evidence as they are, and with the evidence over them in colour.

    Volumes are cut in three planes, images of one slice are shown once. Patient's right is on the left of the picture.

    Args:
        path: where to.
        case: for the title.
        image: the preprocessed case; its first channel is drawn.
        explanation: of it.
        target: what was predicted.
        probabilities: (K,).
        transpose_forward: of the plan.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    background, evidence = image.data[0], explanation.evidence
    views = _views(image, transpose_forward)
    rows, columns = (2, len(views)) if len(views) > 1 else (1, 2)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns + 1.2, 3.9 * rows + 0.9), layout="constrained")
    grey = dict(zip(("vmin", "vmax"), np.percentile(background, (0.5, 99.5)), strict=True))
    reach = max(SMALLEST_RANGE, float(np.abs(evidence).max()))
    for (plain, coloured), view in zip(axes.T if rows > 1 else [axes], views, strict=True):
        position = most_evident_slice(evidence, view.normal)
        height, width = (image.spacing[axis] for axis in view.axes)
        for axis in (plain, coloured):
            axis.imshow(view.cut(background, position), cmap="gray", aspect=height / width, **grey)
            _letter(axis, view)
        colour = view.cut(evidence, position)
        drawn = coloured.imshow(
            colour,
            cmap=COLOURS,
            vmin=-reach,
            vmax=reach,
            aspect=height / width,
            alpha=0.8 * np.sqrt(np.abs(colour) / reach),
        )
        total = background.shape[view.normal]
        plain.set_title(f"{view.name}, slice {position + 1} of {total}" if total > 1 else view.name, fontsize="medium")
    name = target.classes[explanation.class_index]
    figure.colorbar(
        plt.cm.ScalarMappable(drawn.norm, COLOURS),
        ax=axes[-1].tolist() if rows > 1 else axes[-1],
        shrink=0.8,
        label=f"log-odds lost when hidden\n← against {name}        for {name} →",
    )
    figure.suptitle(f"{case}\n{_headline(target, probabilities, explanation.class_index)}")
    figure.supxlabel(
        f"Orange: without it, the model would be less sure of {name}.\n"
        "It shows what the model used, not where a disease is.",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def most_evident_slice(evidence: np.ndarray, axis: int) -> int:
    """The slice along an axis with the most evidence for the class; the middle one where several have the same."""
    profile = np.maximum(evidence, 0).sum(axis=tuple(a for a in range(evidence.ndim) if a != axis))
    best = np.flatnonzero(profile >= profile.max() * (1 - 1e-6))
    return int(best[len(best) // 2])


def _views(image: Image, transpose_forward: Sequence[int]) -> list[_View]:
    """Three anatomical planes; three numbered axes where the orientation is not known; one view of a single slice."""
    shape = image.data.shape[1:]
    if min(shape) == 1:
        normal = int(np.argmin(shape))
        rows, columns = (axis for axis in range(3) if axis != normal)
        return [_View("image", normal, (rows, columns))]
    found = axes_of_planes(image.properties, transpose_forward=transpose_forward)
    if not found:
        return [
            _View(f"axis {normal}", normal, tuple(axis for axis in range(3) if axis != normal)) for normal in range(3)
        ]
    (side, left), (front, back), (height, down) = (found[plane] for plane in ("sagittal", "coronal", "axial"))
    # an axis that runs with RAS is turned: right, anterior and superior come first
    return [
        _View("axial", height, (front, side), (not back, not left), ("R", "L", "A", "P")),
        _View("coronal", front, (height, side), (not down, not left), ("R", "L", "S", "I")),
        _View("sagittal", side, (height, front), (not down, not back), ("A", "P", "S", "I")),
    ]


def _letter(axis, view: _View) -> None:
    from matplotlib.patheffects import withStroke

    axis.set_xticks([])
    axis.set_yticks([])
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    for letter, place, horizontal, vertical in zip(
        view.letters, places, ("left", "right", "center", "center"), ("center", "center", "top", "bottom"), strict=True
    ):
        axis.text(
            *place,
            letter,
            transform=axis.transAxes,
            color="#FFD400",
            ha=horizontal,
            va=vertical,
            path_effects=[withStroke(linewidth=2.5, foreground="black")],
        )


def _headline(target: Target, probabilities: np.ndarray, chosen: int) -> str:
    """The explained class first, then the others, the most probable before the rest."""
    order = [chosen, *(int(k) for k in np.argsort(-probabilities) if k != chosen)]
    shown = [f"{target.classes[k]} {probabilities[k]:.2f}" for k in order[:4]]
    rest = f" and {len(order) - 4} less probable" if len(order) > 4 else ""
    joined = f"{shown[0]} ({', '.join(shown[1:])}{rest})"
    return f"{target.name}: {joined}" + (" (several may be present)" if target.kind == MULTILABEL else "")
