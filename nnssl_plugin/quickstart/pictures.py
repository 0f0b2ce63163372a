"""Draws the report's pictures: curves, slices with captions, contours, Dice per case, seconds per step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.planes import RAS_AXIS
from nnssl_plugin.quickstart.results import ALL_LABELS, Scores

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
"""Told apart with any colour vision (Okabe & Ito 2008)."""
ARM_COLOURS = {"pretrained": "#0072B2", "scratch": "#D55E00"}
DPI = 110
PLANE_OF_AXIS = {axis: plane for plane, axis in RAS_AXIS.items()}


def draw_pretraining(history: Mapping[str, list], path: Path) -> None:
    """The loss and its terms per epoch; solid: training, dashed: validation."""
    figure, (total, terms) = _axes(1, 2, width=9, height=3.4)
    for name, style, label in (("train_losses", "-", "training"), ("val_losses", "--", "validation")):
        _curve(total, history[name], style, color="#0072B2", label=label)
    names = sorted({name.partition("/")[2] for name in history if name.startswith(("train/", "val/"))})
    for colour, name in zip(COLOURS, names, strict=False):
        for kind, style in (("train", "-"), ("val", "--")):
            series = history.get(f"{kind}/{name}", [])
            _curve(terms, series, style, color=colour, label=name if kind == "train" else None)
    total.set(title="Loss", xlabel="epoch")
    terms.set(title="Its terms (solid: training, dashed: validation)", xlabel="epoch")
    for axis in (total, terms):
        axis.legend(fontsize="small")
    _save(figure, path)


def draw_finetuning(histories: Mapping[str, Mapping[str, list]], path: Path) -> None:
    """Loss and pseudo Dice (on validation patches) of the arms per epoch."""
    figure, (loss, dice) = _axes(1, 2, width=9, height=3.4)
    for arm, history in histories.items():
        colour = ARM_COLOURS[arm]
        _curve(loss, history["train_losses"], "-", color=colour, label=f"{arm}, training")
        _curve(loss, history["val_losses"], "--", color=colour, label=f"{arm}, validation")
        _curve(dice, history["mean_fg_dice"], "-", color=colour, label=arm)
    loss.set(title="Loss (cross-entropy minus soft Dice)", xlabel="epoch")
    dice.set(title="Pseudo Dice on validation patches", xlabel="epoch", ylim=(-0.02, 1.02))
    for axis in (loss, dice):
        axis.legend(fontsize="small")
    _save(figure, path)


def draw_dice(scores: Scores, path: Path) -> None:
    """Dice of each test case in both arms, joined by a line, per label and over the labels."""
    names = [*scores.labels, ALL_LABELS]
    figure, axes = _axes(1, len(names), width=1.2 + 1.9 * len(names), height=3.2, sharey=True)
    arms = list(scores.dice)
    for axis, name in zip(axes, names, strict=True):
        values = np.array([scores.of(arm, name) for arm in arms])
        axis.plot([0, 1], values, "-", color="0.6", linewidth=1)
        for place, arm in enumerate(arms):
            axis.plot([place] * len(scores.cases), values[place], "o", color=ARM_COLOURS[arm], markersize=5)
            if not np.isnan(values[place]).all():
                mean = np.nanmean(values[place])
                axis.plot([place - 0.22, place + 0.22], [mean, mean], "-", color=ARM_COLOURS[arm], linewidth=2.5)
        axis.set(title=name, xticks=[0, 1], xticklabels=arms, xlim=(-0.5, 1.5))
        axis.title.set_size("medium")
    axes[0].set(ylabel="Dice per test case (bar: mean)", ylim=(-0.02, 1.02))
    _save(figure, path)


def draw_contours(
    image: Path, truth: Path, predictions: Mapping[str, Path], path: Path, *, labels: Mapping[str, int]
) -> str:
    """True and predicted contours on the slice with the most labels, then the most foreground; one panel per arm.

    The slice lies across the axis with the widest voxels (axial where all are equal), in RAS, with its aspect in mm;
    the patient's right is on the left, as radiologists see it.

    Returns:
        which slice is shown, in words.
    """
    from matplotlib.lines import Line2D

    volume, spacing = _oriented(image)
    true, _ = _oriented(truth)
    axis = 2 - int(np.argmax(spacing[::-1]))
    index = _fullest_slice(true, axis)
    plane = f"{PLANE_OF_AXIS[axis]} slice {index + 1} of {true.shape[axis]}"
    figure, panels = _axes(1, len(predictions), width=3 * len(predictions), height=3.7, grid=False)
    background = np.take(volume, index, axis)
    low, high = np.percentile(volume, (0.5, 99.5))
    across, up = (spacing[a] for a in range(3) if a != axis)
    for panel, (arm, prediction) in zip(panels, predictions.items(), strict=True):
        panel.imshow(
            background.T,
            cmap="gray",
            origin="lower",
            vmin=low,
            vmax=max(high, low + 1e-6),
            aspect=up / across,
            interpolation="nearest",
        )
        predicted, _ = _oriented(prediction)
        for colour, value in zip(COLOURS, labels.values(), strict=False):
            _contour(panel, np.take(true, index, axis) == value, colour, "solid")
            _contour(panel, np.take(predicted, index, axis) == value, colour, "dashed")
        panel.set(title=arm, xticks=[], yticks=[])
        _orient(panel, axis, plane)
    handles = [Line2D([], [], color=c, label=name) for c, name in zip(COLOURS, labels, strict=False)]
    handles += [Line2D([], [], color="black", linestyle=s, label=n) for n, s in (("true", "-"), ("predicted", "--"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize="small")
    _save(figure, path)
    return plane


def draw_captions(slices: Sequence[tuple[str, Path, int, int]], path: Path) -> None:
    """Slices that were described, beside each other.

    Args:
        slices: title, image, stored axis across the slice, and index of each.
        path: the PNG to write.
    """
    figure, panels = _axes(1, len(slices), width=2.6 * len(slices), height=3, grid=False)
    for panel, (title, image, axis, index) in zip(panels, slices, strict=True):
        stored = nibabel.load(image)
        canonical = nibabel.io_orientation(stored.affine)
        volume, spacing = _oriented(image)
        across = int(canonical[axis, 0])
        place = index if canonical[axis, 1] > 0 else volume.shape[across] - 1 - index
        horizontal, vertical = (spacing[a] for a in range(3) if a != across)
        panel.imshow(np.take(volume, place, across).T, cmap="gray", origin="lower", aspect=vertical / horizontal)
        panel.set(xticks=[], yticks=[])
        _orient(panel, across, f"slice {place + 1} of {volume.shape[across]}")
        panel.set_title(title, fontsize="small")
    _save(figure, path)


def draw_times(seconds: Mapping[str, float], path: Path) -> None:
    """Seconds per step as bars, in the order of the pipeline from top to bottom."""
    figure, (axis,) = _axes(1, 1, width=8, height=0.6 + 0.26 * len(seconds))
    places = range(len(seconds))
    bars = axis.barh(places, list(seconds.values()), color="#56B4E9")
    axis.bar_label(bars, [f"{value:.0f} s" for value in seconds.values()], padding=3, fontsize="small")
    axis.set(yticks=list(places), yticklabels=list(seconds), xlabel="seconds")
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.grid(axis="y", visible=False)
    _save(figure, path)


def _curve(axis, series, style, **look):
    if len(series):
        axis.plot(np.asarray(series, float), style, marker=".", **look)  # epochs count from 0, as nnU-Net's do


def _fullest_slice(labels, axis):
    slices = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    fullness = [(len(np.unique(values[values > 0])), (values > 0).sum()) for values in slices]
    return max(range(len(slices)), key=fullness.__getitem__) if labels.any() else len(slices) // 2


def _contour(panel, mask, colour, style):
    from matplotlib.patheffects import Normal, Stroke

    if mask.any() and not mask.all():
        lines = panel.contour(mask.T.astype(float), levels=[0.5], colors=[colour], linestyles=style, linewidths=1.8)
        lines.set(path_effects=[Stroke(linewidth=2.8, foreground="black", alpha=0.5), Normal()])


def affine_of(path: Path) -> np.ndarray:
    """(4, 4) matrix from voxels to RAS mm of an image file."""
    return nibabel.load(path).affine


def _oriented(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A volume in RAS and its spacing in mm."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj), nibabel.affines.voxel_sizes(image.affine)


def _orient(panel, axis: int, slice_shown: str) -> None:
    """Turn a slice across an axis of RAS so that the patient's right is on the left, and say so with letters."""
    across, up = ("P – A" if axis == 0 else "R – L"), ("P – A" if axis == 2 else "I – S")
    if axis != 0:
        panel.invert_xaxis()  # RAS runs from left to right
    panel.set_xlabel(f"{across}   {slice_shown}", fontsize="small")
    panel.set_ylabel(up, fontsize="small")


def _axes(rows, columns, *, width, height, grid=True, **more):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **more)
    for axis in axes.flat:
        if grid:
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, list(axes.flat)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    plt.close(figure)
