"""Which number of a pretraining tells how well it fine-tunes: rank correlations over the pretrainings of a study."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from study_file import Pretraining, Study
from study_results import ALL_LABELS, Run
from study_steps import pretraining_folder, probe_file

from nnssl_plugin.io.files import read_json

STEPS, PROBE = "steps", "probe of frozen features"
FEWEST = 4
"""Pairs of numbers, for a rank correlation."""
UNRELATED = ("epoch_start_timestamps", "epoch_end_timestamps", "lrs", "peak_memory_gib", "seconds_")
"""Logged numbers, or how they begin, that say nothing about features."""


def predictions(study: Study, folder: Path, runs: list[Run]) -> list[dict[str, Any]]:
    """Spearman's ρ of each number with the gain over scratch, over the pretrainings of each method.

    The numbers are the length of a pretraining, what it logged last, and the probe of its encoder on the tuning cases;
    the gain is the mean Dice of its fine-tunings on the evaluation cases less that of scratch with the same seeds.
    """
    rows = []
    for trainer in sorted({each.trainer for each in study.trained.values()}):
        names = [name for name, each in study.trained.items() if each.trainer == trainer]
        told = {name: _told(study, folder, name) for name in names}
        for number in sorted({key for of in told.values() for key in of}):
            for fraction in study.fractions:
                values = [told[name].get(number) for name in names]
                gains = [_gain(study, runs, name, fraction) for name in names]
                rho, n = rank_correlation(values, gains), len(_finite(values, gains))
                if rho is not None:
                    rows.append({"trainer": trainer, "number": number, "fraction": fraction, "n": n, "rho": rho})
    return rows


def rank_correlation(values: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """Spearman's ρ; None with fewer than four finite pairs, or where nothing varies."""
    pairs = _finite(values, others)
    if len(pairs) < FEWEST or (np.ptp(pairs, axis=0) == 0).any():
        return None
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def _finite(values: Sequence[float | None], others: Sequence[float | None]) -> np.ndarray:
    """The pairs (N, 2) of which both are known."""
    pairs = np.array(list(zip(values, others, strict=True)), dtype=float).reshape(-1, 2)
    return pairs[np.isfinite(pairs).all(1)]


def _told(study: Study, folder: Path, name: str) -> dict[str, float | None]:
    """What a finished pretraining says of itself; empty where it has not finished."""
    quality, probe = pretraining_folder(study, folder, name) / "quality.json", probe_file(folder)
    if not quality.exists():
        return {}
    logged = {key: value for key, value in read_json(quality).items() if not key.startswith(UNRELATED)}
    probed = read_json(probe)["arms"].get(name, {}).get("dice") if probe.exists() else None
    return logged | {STEPS: _steps(study.trained[name]), PROBE: probed}


def _steps(pretraining: Pretraining) -> float | None:
    epochs, steps = (pretraining.edits.get(key) for key in ("epochs", "iterations_per_epoch"))
    return epochs * steps if epochs and steps else None


def _gain(study: Study, runs: list[Run], name: str, fraction: float) -> float | None:
    """Mean over the seeds that start from a pretraining of the Dice beside scratch; without arms that have a
    fine-tuning of their own."""
    means = {
        (run.arm, run.seed): float(np.nanmean(list(run.dice[ALL_LABELS].values())))
        for run in runs
        if run.fraction == fraction and run.schedule is None
    }
    alike = [arm.name for arm in study.arms if not arm.finetuning and arm.pretraining is not None]
    starts = [(arm, seed) for arm in study.arms for seed in study.seeds if study.start(arm, seed) == name]
    gains = [
        means[arm.name, seed] - means[study.baseline.name, seed]
        for arm, seed in starts
        if arm.name in alike and {(arm.name, seed), (study.baseline.name, seed)} <= means.keys()
    ]
    return statistics.fmean(gains) if gains else None


def prediction_table(study: Study, rows: list[dict[str, Any]], labelled: dict[float, int]) -> str:
    """Markdown: a row for each method and number, ρ at each number of labelled cases, the strongest first."""
    heads = ["method", "number", "pretrainings", *(f"ρ, {labelled[fraction]} labelled" for fraction in study.fractions)]
    lines = [heads, ["---"] * len(heads)]
    rho = {(row["trainer"], row["number"], row["fraction"]): row["rho"] for row in rows}
    counts = {(row["trainer"], row["number"]): row["n"] for row in rows}

    def strength(pair: tuple[str, str]) -> tuple[str, float]:
        return pair[0], -abs(statistics.fmean(rho.get((*pair, fraction), 0.0) for fraction in study.fractions))

    for pair in sorted(counts, key=strength):
        found = [rho.get((*pair, fraction)) for fraction in study.fractions]
        lines.append([*pair, str(counts[pair]), *("–" if value is None else f"{value:+.2f}" for value in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
