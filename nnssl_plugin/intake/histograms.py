"""One picture of a dataset's numbers: how its spacings, sizes, intensities and masks are distributed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnssl_plugin.intake.ledger import LABEL, Origin
from nnssl_plugin.intake.overview import axes_of, body_shares, first_images
from nnssl_plugin.io.figures import COLOURS, pyplot, save_figure

HISTOGRAMS_FILE = "histograms.png"
BINS = 30
WIDE = 100
"""Ratio of the largest to the smallest value from which on the axis is logarithmic."""
AXES = ("first axis", "second axis", "third axis")


def draw_histograms(folder: Path, origins: Sequence[Origin]) -> Path | None:
    """Draw ``histograms.png``: voxel sizes and voxels along the stored axes, percentiles of the intensities within the
    masks per channel, and the share of the image that the mask takes.

    Args:
        folder: of the dataset.
        origins: of all cases; without any, nothing is drawn.
    """
    if not origins:
        return None
    figure, panels = pyplot().subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    first = first_images(origins)
    _axes(panels[0, 0], [row.spacing_mm for row in first if row.spacing_mm], "voxel size (mm)")
    _axes(panels[0, 1], [row.shape for row in first], "voxels")
    _intensities(panels[1, 0], origins)
    _series(panels[1, 1], {"": np.array(list(body_shares(origins).values()))}, "share of the image in the mask")
    figure.suptitle(f"{len(first)} cases")
    save_figure(figure, folder / HISTOGRAMS_FILE)
    return folder / HISTOGRAMS_FILE


def _axes(panel, rows: Sequence[str], label: str) -> None:
    values = axes_of(rows)
    _series(panel, dict(zip(AXES, values.T, strict=False)) if rows else {}, label)


def _intensities(panel, origins: Sequence[Origin]) -> None:
    """The medians of each channel, and a line from the 1st to the 99th percentile over all its cases."""
    by_channel: dict[str, list[list[float]]] = {}
    for row in origins:
        if row.channel != LABEL and row.percentiles:
            by_channel.setdefault(row.channel, []).append([float(part) for part in row.percentiles.split(";")])
    series = {}
    for channel, rows in sorted(by_channel.items()):
        low, middle, high = np.array(rows).T
        name = f"channel {channel}: " if channel else ""
        series[f"{name}1st to 99th percentile {low.min():.4g} to {high.max():.4g}"] = middle
    _series(panel, series, "median intensity in the mask, per case")


def _series(panel, series: dict[str, np.ndarray], label: str) -> None:
    panel.set_xlabel(label)
    panel.set_ylabel("cases")
    panel.yaxis.get_major_locator().set_params(integer=True)
    filled = {name: values for name, values in series.items() if values.size}
    if not filled:
        panel.text(0.5, 0.5, "not known", ha="center", va="center", transform=panel.transAxes)
        return
    together = np.concatenate(list(filled.values()))
    low, high = float(together.min()), float(together.max())
    margin = 0.05 * max(abs(low), 1.0) if low == high else 0.0
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    if low > 0 and high > WIDE * low:
        edges = np.geomspace(low, high, BINS + 1)
        panel.set_xscale("log")
    for (name, values), colour in zip(filled.items(), COLOURS, strict=False):
        panel.hist(values, bins=edges, histtype="stepfilled", alpha=0.35, color=colour, edgecolor=colour, label=name)
    if any(filled):
        panel.legend(fontsize=8)
