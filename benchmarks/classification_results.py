"""What the runs of a classification bed say together: AUROC and accuracy, paired by seed and image, with intervals."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from classification_study import FROZEN, SCRATCH, SHUFFLED, UNTRAINED, Bed, Run

from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.statistics.bootstrap import percentile_interval
from nnssl_plugin.tasks.classification.metrics import class_metrics

METRICS = ("auroc", "accuracy")
SAMPLES = 2000
"""Draws of seeds and images."""
PACKAGES = ("torch", "nnunetv2", "nnssl_plugin")

OfSeeds = Mapping[int, Mapping[str, np.ndarray]]
"""Seed → metric → (1 + SAMPLES,): of the images as they are, and of each draw of them."""


def summarise(bed: Bed, folder: Path) -> dict[str, Any]:
    """Rows of arms and fractions with their differences to scratch, controls, calibration, rates and cost.

    Intervals draw seeds and images, each on their own. Every seed reads the images that it evaluated from one draw of
    all: where seeds evaluate the same images these cross, where each has its own they are drawn inside of it.
    """
    runs = [read_json(path) for path in sorted((folder / "runs").glob("*.json"))]
    evaluated = [run for run in runs if run["fraction"] is not None]
    drawn = drawn_metrics(evaluated)

    def of(arm: str, fraction: float, control: str | None = None) -> dict[int, dict[str, np.ndarray]]:
        wanted = (arm, fraction, control)
        return {r["seed"]: drawn[r["name"]] for r in evaluated if (r["arm"], r["fraction"], r["control"]) == wanted}

    pool, largest = pool_size(folder), max(bed.fractions)
    rows = [
        {"look": "as trained", "labelled_cases": round(fraction * pool), "arm": arm}
        | row_of(own, of(SCRATCH, fraction), beside="scratch", alone=arm == SCRATCH)
        for fraction in bed.fractions
        for arm in bed.arms
        if (own := of(arm, fraction))
    ]
    controls = [
        {"control": control, "labelled_cases": round(largest * pool), "arm": arm}
        | row_of(own, of(UNTRAINED, largest, FROZEN), beside="untrained", alone=control == SHUFFLED or arm == UNTRAINED)
        for control, arms in ((SHUFFLED, bed.arms), (FROZEN, (*bed.pretrainings, UNTRAINED)))
        for arm in arms
        if (own := of(arm, largest, control))
    ]
    return {
        "name": bed.name,
        "page": bed.page,
        "question": bed.question,
        "data": bed.data,
        "metric": "AUROC",
        "evaluation_cases": len({case for run in evaluated for case in run["truth"]}),
        "rows": rows,
        "controls": controls,
        "calibration": [
            {"labelled_cases": round(fraction * pool)} | calibration(twins)
            for fraction in bed.fractions
            if (twins := [r for r in evaluated if (r["arm"], r["fraction"], r["control"]) == (SCRATCH, fraction, None)])
        ],
        "tuning": tuning(runs),
        "pretraining": [read_json(path) for path in sorted((folder / "pretrained").glob("*.json"))],
        "cost_minutes": cost_minutes(folder, runs),
        "run_minutes": sum(run["seconds"] for run in runs) / 60,
        "versions": {name: version(name) for name in PACKAGES},
    }


def pool_size(folder: Path) -> int:
    """Images of the pool of a seed."""
    folds = read_json(folder / "folds.json")
    return next(len(fold["train"]) for name, fold in folds.items() if name.endswith("-pool"))


# ---------------------------------------------------------------- numbers


def drawn_metrics(runs: Sequence[Run]) -> dict[str, dict[str, np.ndarray]]:
    """Name of a run → metric → (1 + SAMPLES,), with the same draw of the images for all runs."""
    cases = sorted({case for run in runs for case in run["truth"]})
    place = {case: number for number, case in enumerate(cases)}
    share = np.full(len(cases), 1 / len(cases))
    draws = np.random.default_rng(0).multinomial(len(cases), share, size=SAMPLES)
    weights = np.vstack([np.ones(len(cases)), draws])
    found = {}
    for run in runs:
        own = list(run["truth"])
        labels = np.array([run["truth"][case] for case in own])
        probabilities = np.array([run["probabilities"][case] for case in own])
        target = Target("diagnosis", run["kind"], tuple(run["classes"]))
        metrics = class_metrics(labels, probabilities, weights[:, [place[case] for case in own]], target=target)
        found[run["name"]] = {metric: metrics[metric] for metric in METRICS}
    return found


def row_of(own: OfSeeds, others: OfSeeds, *, beside: str, alone: bool) -> dict[str, Any]:
    """Means over the seeds with their intervals, and the paired differences to ``others`` unless it stands alone."""
    together = sorted(set(own) & set(others))
    row: dict[str, Any] = {"seeds": len(own)}
    for metric in METRICS:
        values = {seed: float(of[metric][0]) for seed, of in sorted(own.items())}
        entry = {"mean": statistics.fmean(values.values()), "per_seed": list(values.values())}
        entry["sd_over_seeds"] = statistics.stdev(values.values()) if len(values) > 1 else None
        entry["interval"] = interval([of[metric] for of in own.values()])
        difference = None
        if not alone and together:
            apart = [own[seed][metric] - others[seed][metric] for seed in together]
            low, high = interval(apart)
            difference = {"mean": statistics.fmean(float(each[0]) for each in apart), "low": low, "high": high}
        entry[f"difference_to_{beside}"] = difference
        entry["paired"] = [
            statistics.fmean(float(of[seed][metric][0]) for seed in together) for of in (own, others) if together
        ]
        row |= entry if metric == "auroc" else {metric: entry}
    return row


def interval(of_seeds: Sequence[np.ndarray]) -> list[float | None]:
    """The 95 % interval of the mean over seeds, (1 + SAMPLES,) each; [None, None] for a single one."""
    number = len(of_seeds)
    if number < 2:
        return [None, None]
    seeds = np.random.default_rng(1).multinomial(number, np.full(number, 1 / number), size=SAMPLES)
    return percentile_interval((np.stack([each[1:] for each in of_seeds], 1) * seeds).sum(1) / number)


def calibration(twins: Sequence[Run]) -> dict[str, Any]:
    """Whether training from scratch has ended: its gain in the last fifth beside a third of the spread of seeds."""
    finals = [run["curve"][-1] for run in twins]
    gain = statistics.fmean(run["curve"][-1] - run["curve"][-1 - len(run["curve"]) // 5] for run in twins)
    spread = statistics.stdev(finals) if len(finals) > 1 else None
    return {
        "seeds": len(finals),
        "gain_in_last_fifth": gain,
        "sd_over_seeds": spread,
        "converged": None if spread is None else gain < spread / 3,
    }


def tuning(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """Arm → seed → learning rate → AUROC on the images for tuning."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        if run["fraction"] is None:
            found.setdefault(run["arm"], {}).setdefault(str(run["seed"]), {})[str(run["lr"])] = run["auroc"]
    return found


def cost_minutes(folder: Path, runs: Sequence[Run]) -> dict[str, float]:
    """Stage → minutes of the processor, without preprocessing."""
    pretrained = [read_json(path) for path in (folder / "pretrained").glob("*.json")]
    stages = {
        "tuning": [run for run in runs if run["fraction"] is None],
        "fine-tuning": [run for run in runs if run["fraction"] is not None and run["control"] != FROZEN],
        "frozen": [run for run in runs if run["control"] == FROZEN],
    }
    stages |= {f"pretraining {arm}": [run for run in pretrained if run["arm"] == arm] for arm in _arms(pretrained)}
    return {stage: sum(run["cpu_seconds"] for run in of_stage) / 60 for stage, of_stage in stages.items()}


def _arms(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({run["arm"] for run in runs})


# ---------------------------------------------------------------- table


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: arms, controls, whether scratch has converged, rates and cost."""
    head = ["labelled images", "arm", "AUROC (95 %)", "seeds", "beside scratch", "accuracy (95 %)", "beside scratch"]
    lines = [head, ["---"] * len(head)]
    lines += [_cells(row, row["arm"], "scratch") for row in summary["rows"]]
    lines += [_cells(row, f"{row['arm']}, {row['control']}", "untrained") for row in summary["controls"]]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_notes(summary)]) + "\n"


def _cells(row: Mapping[str, Any], arm: str, beside: str) -> list[str]:
    key = f"difference_to_{beside}"
    suffix = "" if beside == "scratch" else f" ({beside})"
    cells = [str(row["labelled_cases"]), arm]
    for entry in (row, row["accuracy"]):
        cells.append(f"{entry['mean']:.3f} ({_span(*entry['interval'])})")
        if entry is row:
            cells.append(", ".join(f"{value:.3f}" for value in row["per_seed"]))
        found = entry[key]
        cells.append(f"{found['mean']:+.3f} ({_span(found['low'], found['high'], '+')}){suffix}" if found else "")
    return cells


def _span(low: float | None, high: float | None, sign: str = "") -> str:
    return "–" if low is None else f"{low:{sign}.3f} to {high:{sign}.3f}"


def _notes(summary: Mapping[str, Any]) -> Iterator[str]:
    for found in summary["calibration"]:
        spread = "–" if found["sd_over_seeds"] is None else f"{found['sd_over_seeds']:.3f}"
        yield (
            f"- From scratch, {found['labelled_cases']} labels: {found['gain_in_last_fifth']:+.3f} in the last fifth, "
            f"standard deviation over seeds {spread}, converged: {found['converged']}."
        )
    for arm, of_seed in summary["tuning"].items():
        best = [f"{seed}: {max(rates, key=rates.__getitem__)}" for seed, rates in of_seed.items()]
        yield f"- Learning rate of {arm} by seed: {', '.join(best)}."
    for run in summary["pretraining"]:
        yield f"- {run['arm']}, seed {run['seed']}: loss {run['losses'][0]:.3f} → {run['losses'][-1]:.3f}."
    spent = ", ".join(f"{stage} {minutes:.1f}" for stage, minutes in summary["cost_minutes"].items())
    yield f"- Minutes of the processor: {spent}; {', '.join(f'{k} {v}' for k, v in summary['versions'].items())}."
