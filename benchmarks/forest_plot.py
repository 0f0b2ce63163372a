"""One picture of all beds: each arm's difference to training from scratch, with its interval.

    python benchmarks/forest_plot.py docs/results/beds -o docs/results/forest.png

reads the summary.json files of the beds, kept as ``docs/results/beds/NAME.json``. Hollow marks stand where training
from scratch has not converged, so that a gain would be a head start.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from study_figures import COLOURS, MARKERS, pyplot, save

from nnssl_plugin.io.files import read_json


@dataclass(frozen=True)
class Line:
    """One arm of a bed with a number of labels."""

    title: str
    """What it says on the left."""
    arm: str
    difference: dict
    converged: bool
    """Whether training from scratch has."""


def lines_of(folder: Path) -> list[Line]:
    """The differences of all beds by name, one after another; those to a converged training first."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        bed = read_json(path)
        calibrated = {row["labelled_cases"] for row in bed["calibration"] if row["converged"]}
        for row in bed["rows"]:
            if row["difference_to_scratch"] is not None and row["difference_to_scratch"]["low"] is not None:
                look = "" if row["look"] == "as trained" else f", {row['look']}"
                title = f"{bed['name']}, {row['labelled_cases']} labels{look} ({bed['metric']}, {row['seeds']} seeds)"
                converged = row["labelled_cases"] in calibrated
                lines.append(Line(title, row["arm"], row["difference_to_scratch"], converged))
    return sorted(lines, key=lambda line: not line.converged)


def draw(lines: list[Line], path: Path) -> None:
    """Right of 0 the pretrained network is better."""
    titles, arms = list(dict.fromkeys(line.title for line in lines)), list(dict.fromkeys(line.arm for line in lines))
    of_title = {title: [line.arm for line in lines if line.title == title] for title in titles}
    step = min(0.25, 0.8 / max(map(len, of_title.values())))
    figure, axis = pyplot().subplots(figsize=(9, 1.2 + 0.55 * len(titles)), layout="constrained")
    for line in lines:
        number, own = arms.index(line.arm), of_title[line.title]
        height = titles.index(line.title) + step * (own.index(line.arm) - (len(own) - 1) / 2)
        style = {"color": COLOURS[number], "markerfacecolor": COLOURS[number] if line.converged else "white"}
        axis.plot([line.difference["low"], line.difference["high"]], [height] * 2, linewidth=2, **style)
        axis.plot(line.difference["mean"], height, marker=MARKERS[number], markersize=6, **style)
    for number, arm in enumerate(arms):
        axis.plot([], [], color=COLOURS[number], marker=MARKERS[number], label=arm)
    if not all(line.converged for line in lines):
        axis.plot([], [], color="grey", marker="o", markerfacecolor="white", label="hollow: scratch has not converged")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(titles)), titles)
    axis.set_ylim(len(titles) - 0.5, -0.5)
    axis.set_xlabel("difference to training from scratch,\n95 % interval over seeds and cases")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the summaries of the beds")
    parser.add_argument("-o", required=True, type=Path, help="picture to write")
    args = parser.parse_args()
    draw(lines_of(args.folder), args.o)


if __name__ == "__main__":
    main()
