"""Retrieval of one or several indexes as a figure: recall at growing depth and mean average precision, with chance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.io.figures import COLOURS, pyplot, save_figure
from nnssl_plugin.statistics.ranking import DEPTHS

METRICS = (*(f"recall@{k}" for k in DEPTHS), "map")
TITLES = (*(f"R@{k}" for k in DEPTHS), "mAP")


def draw_retrieval(path: str | Path, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A panel per rule: the indexes' values with their 95 % intervals over subjects, chance as a dashed line.

    Args:
        path: of the PNG.
        results: index → rule → result, as ``evaluation`` has them.
    """
    rules = list(next(iter(results.values())))
    figure, axes = pyplot().subplots(
        1, len(rules), figsize=(1.5 + 4.2 * len(rules), 3.6), squeeze=False, layout="constrained"
    )
    for panel, rule in zip(axes[0], rules, strict=True):
        _draw_rule(panel, rule, {name: of_rules[rule] for name, of_rules in results.items()})
    axes[0, 0].set_ylabel("share")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    save_figure(figure, path, dpi=120)


def _draw_rule(panel, rule: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    places = np.arange(len(METRICS))
    spread = np.linspace(-0.25, 0.25, len(results)) if len(results) > 1 else [0.0]
    for number, (name, result) in enumerate(results.items()):
        for place, metric in zip(places, METRICS, strict=True):
            measured = result["metrics"][metric]
            colour, label = COLOURS[number % len(COLOURS)], name if place == 0 else None
            x = place + spread[number]
            if None not in measured["interval"]:
                panel.vlines(x, *measured["interval"], color=colour, alpha=0.5, linewidth=3)
            panel.plot(x, measured["value"], "o", color=colour, label=label, markersize=5)
    first = next(iter(results.values()))
    for place, metric in zip(places, METRICS, strict=True):
        chance = first["chance"][metric]
        panel.hlines(
            chance, place - 0.35, place + 0.35, color="0.4", linestyle="--", label="chance" if place == 0 else None
        )
    panel.set(title=f"by {rule} ({first['queries']} queries)", ylim=(-0.02, 1.05), xlim=(-0.6, len(METRICS) - 0.4))
    panel.set_xticks(places, TITLES)
    panel.spines[["top", "right"]].set_visible(False)
