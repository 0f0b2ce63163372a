"""One picture of all beds: each arm's difference to training from scratch, with its interval.

    python benchmarks/forest_plot.py docs/results/beds -o docs/results/forest.png

reads the summary.json files of the beds, kept as ``docs/results/beds/NAME.json``.
"""

import argparse
from pathlib import Path

from study_figures import COLOURS, MARKERS, pyplot, save

from nnssl_plugin.io.files import read_json


def lines_of(folder: Path) -> list[tuple[str, str, dict]]:
    """What each line says on the left, its arm, and its difference; beds by name, one after another."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        bed = read_json(path)
        for row in bed["rows"]:
            if row["difference_to_scratch"] is not None and row["difference_to_scratch"]["low"] is not None:
                look = "" if row["look"] == "as trained" else f", {row['look']}"
                title = f"{bed['name']}, {row['labelled_cases']} labels{look} ({bed['metric']}, {row['seeds']} seeds)"
                lines.append((title, row["arm"], row["difference_to_scratch"]))
    return lines


def draw(lines: list[tuple[str, str, dict]], path: Path) -> None:
    """Right of 0 the pretrained network is better."""
    titles, arms = list(dict.fromkeys(line[0] for line in lines)), list(dict.fromkeys(line[1] for line in lines))
    of_title = {title: [line[1] for line in lines if line[0] == title] for title in titles}
    step = min(0.25, 0.8 / max(map(len, of_title.values())))
    figure, axis = pyplot().subplots(figsize=(9, 1.2 + 0.55 * len(titles)), layout="constrained")
    for title, arm, found in lines:
        number, own = arms.index(arm), of_title[title]
        height = titles.index(title) + step * (own.index(arm) - (len(own) - 1) / 2)
        axis.plot([found["low"], found["high"]], [height] * 2, color=COLOURS[number], linewidth=2)
        axis.plot(found["mean"], height, color=COLOURS[number], marker=MARKERS[number], markersize=6)
    for number, arm in enumerate(arms):
        axis.plot([], [], color=COLOURS[number], marker=MARKERS[number], label=arm)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(titles)), titles)
    axis.set_ylim(len(titles) - 0.5, -0.5)
    axis.set_xlabel("difference to training from scratch,\n95 % interval over seeds and cases")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="best")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the summaries of the beds")
    parser.add_argument("-o", required=True, type=Path, help="picture to write")
    args = parser.parse_args()
    draw(lines_of(args.folder), args.o)


if __name__ == "__main__":
    main()
