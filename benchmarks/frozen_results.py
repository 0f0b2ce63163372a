"""What a study of frozen features found: means, paired differences with intervals, what predicts the probe; figures."""

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from frozen_study import Study
from study_figures import COLOURS, MARKERS
from study_prediction import rank_correlation

from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.statistics.bootstrap import hierarchical_bootstrap

RANDOM, MAE = "random", "MAE"
BASELINES = (RANDOM, MAE)
PACKAGES = ("nnssl_plugin", "nnunetv2", "torch", "numpy")
Runs = Sequence[dict[str, Any]]


def write_results(study: Study, runs: Runs, folder: Path, *, study_file: Path, device: str, jobs: int) -> dict:
    """result.json, table.md and figures from the runs that are done."""
    statistics = [row for arm in study.arms for number in study.labelled if (row := summarise(runs, arm.name, number))]
    result = {
        "study": study.name,
        "question": study.question,
        "setting": {"study_file": study_file.name, "device": device, "jobs": jobs},
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "cost": {
            "runs": len(runs),
            "hours_training": sum(run["seconds_training"] for run in runs) / 3600,
            "hours_probing": sum(run["seconds_probing"] for run in runs) / 3600,
        },
        "statistics": statistics,
        "comparisons": comparisons(study, runs),
        "prediction": predictions(study, runs),
    }
    write_json(folder / "result.json", result)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(table(study, result), encoding="utf-8")
    if statistics:
        draw_arms(study, statistics, folder / "arms.png")
    curves = [arm for arm in study.arms if arm.snapshots or arm.name.rpartition("-")[2].isdigit()]
    if curves:
        draw_lengths(study, runs, folder / "lengths.png")
    return result


def scores_of(runs: Runs, arm: str, number: int, split: str = "dice") -> dict[int, np.ndarray]:
    """Seed → Dice (draws, cases), the parts of a cross-validation side by side; seeds that lack a part are left out."""
    own = [run for run in runs if run["arm"] == arm]
    parts = {run["part"] for run in runs}
    found: dict[int, np.ndarray] = {}
    for seed in sorted({run["seed"] for run in own}):
        of_seed = sorted((run for run in own if run["seed"] == seed), key=lambda run: run["part"])
        if {run["part"] for run in of_seed} == parts:
            found[seed] = np.concatenate([np.array(run[split][str(number)], dtype=float) for run in of_seed], axis=1)
    return found


def summarise(runs: Runs, arm: str, number: int) -> dict[str, Any] | None:
    """Mean Dice of an arm at a number of labelled cases, per seed too, and its differences to the baselines."""
    own = scores_of(runs, arm, number)
    if not own:
        return None
    per_seed = [float(np.nanmean(scores)) for scores in own.values()]
    tuning = scores_of(runs, arm, number, "tuning")
    row = {
        "arm": arm,
        "labelled": number,
        "mean": float(np.mean(per_seed)),
        "tuning": float(np.mean([np.nanmean(scores) for scores in tuning.values()])),
        "per_seed": per_seed,
        "draws": len(next(iter(own.values()))),
        "cases": next(iter(own.values())).shape[1],
        "seconds_training": _mean(run["seconds_training"] for run in runs if run["arm"] == arm),
        "seconds_probing": _mean(run["seconds_probing"] for run in runs if run["arm"] == arm),
        "shuffled_labels": _mean(np.nanmean(run["shuffled"]) for run in runs if run["arm"] == arm),
    }
    for baseline in BASELINES:
        row[f"over_{baseline}"] = None if arm == baseline else difference(own, scores_of(runs, baseline, number))
    return row


def difference(own: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> dict[str, Any] | None:
    """Mean paired difference over the seeds that both have, its interval over seeds, draws and cases, and per seed."""
    shared = sorted(own.keys() & other.keys())
    if not shared:
        return None
    differences = np.stack([own[seed] - other[seed] for seed in shared])  # (seeds, draws, cases)
    interval = hierarchical_bootstrap(differences if differences.shape[1] > 1 else differences[:, 0])
    return {
        "mean": interval.mean,
        "low": _plain(interval.low),
        "high": _plain(interval.high),
        "seeds": len(shared),
        "per_seed": np.nanmean(differences, axis=(1, 2)).tolist(),
    }


def comparisons(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """Each arm beside each one before it that is no baseline, at each number of labelled cases: on the evaluation
    cases and on the tuning cases, over the seeds that both have."""
    rows = []
    others = [arm.name for arm in study.arms if arm.name not in BASELINES]
    for (beside, arm), number in product(combinations(others, 2), study.labelled):
        found = {
            split: difference(scores_of(runs, arm, number, split), scores_of(runs, beside, number, split))
            for split in ("dice", "tuning")
        }
        if found["dice"] is not None:
            rows.append({"arm": arm, "beside": beside, "labelled": number, **found})
    return rows


def predictions(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """Spearman's correlation of each logged number with the probe's Dice, of one method's runs of different lengths
    (their last epochs), and along single runs (the epochs of their snapshots, mean over the runs)."""
    number, rows = str(study.labelled[min(1, len(study.labelled) - 1)]), []
    for method in sorted({arm.name.rpartition("-")[0] for arm in study.arms if arm.name.rpartition("-")[2].isdigit()}):
        of_method = [run for run in runs if run["arm"] == method or _is_length(run["arm"], method)]
        steps = [_steps(study, run["arm"]) for run in of_method]
        ends = [float(np.nanmean(run["dice"][number])) for run in of_method]
        names = sorted({name for run in of_method for name in run["log"]} - {"epoch_start_timestamps"})
        along = [_along(run, number, study) for run in of_method if run["snapshots"]]
        rows.append(
            _correlation(
                method, "steps", steps, ends, [rank_correlation(points["steps"], points["dice"]) for points in along]
            )
        )
        for name in names:
            last = [run["log"].get(name, [math.nan])[-1] for run in of_method]
            inside = [
                rank_correlation(points["log"][name], points["dice"]) for points in along if name in points["log"]
            ]
            rows.append(_correlation(method, name, last, ends, inside))
    return [row for row in rows if row["across"] is not None or row["along"] is not None]


def table(study: Study, result: dict[str, Any]) -> str:
    """Markdown: an arm a row, Dice at each number of labelled cases, then differences to the baselines."""
    rows = {(row["arm"], row["labelled"]): row for row in result["statistics"]}
    numbers = [str(number) for number in study.labelled]
    lines = [["arm", "seeds", *(f"{n} labelled" for n in numbers)]]
    lines[0] += [f"over {baseline}, {n}" for baseline in BASELINES for n in numbers] + ["training, s", "probe, s"]
    lines.append(["---"] * len(lines[0]))
    for arm in study.arms:
        own = [rows[arm.name, number] for number in study.labelled if (arm.name, number) in rows]
        if not own:
            continue
        cells = [arm.name, str(len(own[0]["per_seed"])), *(f"{row['mean']:.3f}" for row in own)]
        cells += [_interval(row[f"over_{baseline}"]) for baseline in BASELINES for row in own]
        lines.append([*cells, f"{own[0]['seconds_training']:.0f}", f"{own[0]['seconds_probing']:.0f}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    if result["prediction"]:
        text += "\n| method | logged number | across lengths | n | along one run |\n|---|---|---|---|---|\n"
        for row in sorted(result["prediction"], key=lambda row: (row["method"], -abs(row["along"] or 0))):
            cells = [row["method"], row["name"], _number(row["across"]), str(row["runs"]), _number(row["along"])]
            text += f"| {' | '.join(cells)} |\n"
    return text


def draw_arms(study: Study, rows: list[dict[str, Any]], path: Path) -> None:
    """Difference of each arm to the random encoder, a colour for each number of labelled cases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [arm.name for arm in study.arms if arm.name != RANDOM and any(row["arm"] == arm.name for row in rows)]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.34 * len(shown)), layout="constrained")
    for number, labelled in enumerate(study.labelled):
        for place, arm in enumerate(shown):
            over = next((r["over_random"] for r in rows if (r["arm"], r["labelled"]) == (arm, labelled)), None)
            if over is None:
                continue
            y = -place + 0.22 * (len(study.labelled) - 1) / 2 - 0.22 * number
            if over["low"] is not None:
                axis.plot([over["low"], over["high"]], [y, y], linewidth=2, color=COLOURS[number])
            axis.plot(over["mean"], y, MARKERS[number], markersize=5, color=COLOURS[number])
        axis.plot([], [], MARKERS[number], color=COLOURS[number], label=f"{labelled} labelled")
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks([-place for place in range(len(shown))], shown)
    axis.set_ylim(0.5 - len(shown), 0.5)
    axis.set_xlabel("Dice of the probe over the random encoder, 95 % interval over seeds, draws and cases")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="best", fontsize=9)
    _save(figure, path)


def draw_lengths(study: Study, runs: Runs, path: Path) -> None:
    """Dice of the probe over the length of the pretraining: whole runs, and on the way in the longest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    number = study.labelled[min(1, len(study.labelled) - 1)]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    methods = sorted({arm.name.rpartition("-")[0] for arm in study.arms if arm.name.rpartition("-")[2].isdigit()})
    for place, method in enumerate(methods):
        points: dict[int, list[float]] = {}
        for run in runs:
            if run["arm"] == method or _is_length(run["arm"], method):
                points.setdefault(_steps(study, run["arm"]), []).append(float(np.nanmean(run["dice"][str(number)])))
        steps = sorted(points)
        style = {"color": COLOURS[place], "marker": MARKERS[place]}
        axis.plot(steps, [np.mean(points[step]) for step in steps], linewidth=2, label=f"{method}: whole runs", **style)
        axis.plot(
            *zip(*[(step, dice) for step in steps for dice in points[step]], strict=True),
            linestyle="",
            fillstyle="none",
            **style,
        )
        for index, run in enumerate(run for run in runs if _is_length(run["arm"], method) and run["snapshots"]):
            along = _along(run, str(number), study)
            label = f"{method}: on the way" if index == 0 else None
            axis.plot(along["steps"], along["dice"], linestyle=":", color=COLOURS[place], label=label)
    randoms = [float(np.nanmean(run["dice"][str(number)])) for run in runs if run["arm"] == RANDOM]
    if randoms:
        axis.axhline(np.mean(randoms), color="0.4", linestyle="--", linewidth=1, label="random encoder")
    axis.set_xscale("log")
    axis.set_xlabel("steps of pretraining")
    axis.set_ylabel(f"Dice of the probe, {number} labelled")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    _save(figure, path)


def _along(run: dict[str, Any], number: str, study: Study) -> dict[str, Any]:
    """Steps, Dice and logged numbers at the snapshots of a run and at its end."""
    per_epoch = study.pretraining["iterations_per_epoch"]
    steps = [*map(int, run["snapshots"]), _steps(study, run["arm"])]
    dice = [float(np.nanmean(shot["evaluation"][number])) for shot in run["snapshots"].values()]
    log = {
        name: [series[step // per_epoch - 1] for step in steps]
        for name, series in run["log"].items()
        if len(series) >= steps[-1] // per_epoch
    }
    return {"steps": steps, "dice": [*dice, float(np.nanmean(run["dice"][number]))], "log": log}


def _is_length(arm: str, method: str) -> bool:
    name, _, steps = arm.rpartition("-")
    return name == method and steps.isdigit()


def _steps(study: Study, name: str) -> int:
    arm = next(arm for arm in study.arms if arm.name == name)
    block = study.pretraining | arm.edits
    return block["epochs"] * block["iterations_per_epoch"]


def _correlation(method: str, name: str, values: list, dice: list, inside: list) -> dict[str, Any]:
    known = [value for value in inside if value is not None]
    return {
        "method": method,
        "name": name,
        "across": rank_correlation(values, dice),
        "runs": len(dice),
        "along": float(np.mean(known)) if known else None,
        "along_runs": len(known),
    }


def _mean(values) -> float:
    return float(np.mean(list(values)))


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _interval(over: dict[str, Any] | None) -> str:
    if over is None:
        return ""
    edges = "" if over["low"] is None else f" ({over['low']:+.3f} to {over['high']:+.3f})"
    return f"{over['mean']:+.3f}{edges}"


def _save(figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
