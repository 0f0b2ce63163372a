"""Draws progress.png: everything that a training logs per epoch, in one picture."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnssl_plugin.io.figures import pyplot, save_figure


class Panel(NamedTuple):
    """A part of the picture."""

    title: str
    shows: Callable[[str], bool]
    """Which logged series belong to it."""
    without: str = "not logged"
    """Why it may have no series, for the line under the picture."""


TERMS = "Terms of the loss (solid: training, dashed: validation)"
FEW = "needs a method that compares features, and 4 validation samples or more"
SEPARATION = ("diagnostics/silhouette", "diagnostics/cosine_gap")
RETRIEVAL = "diagnostics/retrieval_"
ELSEWHERE = (*SEPARATION, RETRIEVAL, "diagnostics/token_std")
"""Diagnostics with a panel of another kind."""
PANELS = (
    Panel("Loss (solid: training, dashed: validation)", lambda k: k in ("train_losses", "val_losses")),
    Panel(TERMS, lambda k: k.startswith(("train/", "val/")), "the loss has one term"),
    Panel("Learning rate", lambda k: k == "lrs"),
    Panel(
        "Spread of the features (0 = collapsed)", lambda k: k.startswith(("feature_std", "diagnostics/token_std")), FEW
    ),
    Panel("Effective rank of the features", lambda k: k.startswith("effective_rank"), FEW),
    Panel("Seconds per epoch", lambda k: k in ("seconds_waiting", "seconds_computing")),
    Panel(
        "Diagnostics",
        lambda k: k.startswith("diagnostics/") and not k.startswith(ELSEWHERE),
        "this method measures nothing else",
    ),
    Panel(
        "Retrieval; with another case or an empty volume it must stay at chance",
        lambda k: k.startswith(RETRIEVAL),
        "measured by methods that align volumes with slices",
    ),
    Panel(
        "Structures told apart (by labels)",
        lambda k: k.startswith(SEPARATION),
        "measured where a method asks for labels and cases have them",
    ),
    Panel(
        "Dice of a linear readout of the encoder",
        lambda k: k.startswith("probe/"),
        "set probe_every, on a dataset with labels",
    ),
    Panel("Skipped steps", lambda k: k == "skipped_steps"),
    Panel("Peak memory (GiB)", lambda k: k == "peak_memory_gib", "this system does not tell"),
)
"""Of a pretraining."""
LEGIBLE = 8
"""Lines of a legend that can be told apart."""
CHARACTERS = 180
"""Longest line under the picture."""


def draw_progress(history: dict[str, list], path: str | Path, *, panels: Sequence[Panel] = PANELS) -> None:
    """One picture of everything that is logged per epoch; the first epoch is 0, as in nnU-Net's log.

    Args:
        history: name → one number per epoch.
        path: the PNG to write.
        panels: two to a row; those without a number are named under the picture, with the reason.
    """
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    series = {k: np.asarray(v, dtype=float) for k, v in history.items() if len(v) and np.ndim(v[0]) == 0}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    panels = [Panel(*panel) for panel in panels]
    empty = [panel for panel in panels if not any(map(panel.shows, series))]
    drawn = [part for panel in panels if panel not in empty for part in _by_measure(panel, series)]
    rows = max(1, math.ceil(len(drawn) / 2))
    figure, axes = plt.subplots(rows, 2, figsize=(15, 4.25 * rows), squeeze=False)
    left_out = _left_out(empty)
    bottom = (0.15 + 0.04 * len(left_out.splitlines())) / rows
    figure.subplots_adjust(0.06, bottom, 0.98, 1 - 0.12 / rows, hspace=0.35, wspace=0.15)
    figure.text(0.06, 0.02 / rows, left_out, fontsize="small")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _draw_lines(axis, panel, {name: values for name, values in series.items() if panel.shows(name)})
        axis.set_title(panel.title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.margins(y=0.1)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    save_figure(figure, path)


def _by_measure(panel: Panel, names: Iterable[str]) -> list[Panel]:
    """The panel, or one for each of its terms or diagnostics where several kinds of images would crowd it."""
    shown = [name.split("/") for name in names if panel.shows(name)]
    if all(len(parts) < 3 for parts in shown) or len({tuple(parts[1:]) for parts in shown}) <= LEGIBLE:
        return [panel]
    measures = dict.fromkeys(parts[1] for parts in shown)
    return [
        panel._replace(title=f"{panel.title}: {measure}", shows=partial(_shows_measure, panel, measure))
        for measure in measures
    ]


def _shows_measure(panel: Panel, measure: str, name: str) -> bool:
    return panel.shows(name) and name.split("/")[1] == measure


def _draw_lines(axis, panel: Panel, series: dict[str, np.ndarray]) -> None:
    """The lines of a panel; a term has one colour, and one line of the legend, in training and validation."""
    terms = {name: name.partition("/")[2] or name for name in series}
    measures = {term.partition("/")[0] for term in terms.values()}
    several = len(measures) == 1 and len(set(terms.values())) > 1  # kinds of one measure, which the title names
    colours: dict[str, str] = {}
    for name, values in series.items():
        term, known = terms[name], np.flatnonzero(np.isfinite(values))  # joined over epochs without a number
        (line,) = axis.plot(
            known,
            values[known],
            "--" if name.startswith("val") else "-",
            marker="." if len(known) < 40 else "",
            color=colours.get(term),
            label=None if term in colours else term.partition("/")[2] if several else term,
        )
        colours[term] = line.get_color()


def _left_out(panels: Sequence[Panel]) -> str:
    """The line under the picture, or nothing."""
    if not panels:
        return ""
    named = "; ".join(f"{panel.title}: {panel.without}" for panel in panels)
    return textwrap.fill(f"Not shown. {named}.", CHARACTERS)
