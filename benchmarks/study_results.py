"""What came out of a study: Dice per run, case and label, and statistics."""

import os
import platform
import statistics
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from study_file import SHIFTED, Arm, Study
from study_steps import RUNS, probe_file, separation_file

from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.label_fractions import nested_subsets
from nnssl_plugin.statistics.bootstrap import hierarchical_bootstrap

ALL_LABELS = "mean"
"""Name of the mean over the labels of a case."""
PACKAGES = ("nnssl_plugin", "nnunetv2", "torch", "numpy")


LOOKS = {"dice": "as trained", "dice_shifted": "another look"}
"""Where a run keeps the Dice of the evaluation cases, and how they look there."""
FIELD = "MAE"
"""Name of the arm of the field's known quantity, with which the other pretrainings are compared too."""
ENOUGH = 0.95
"""Share of the twin's Dice that counts as having reached it."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its result on the cases that it segmented."""

    name: str
    arm: str
    recipe: str | None
    seed: int
    fraction: float | None
    """None: a run of the tuning."""
    schedule: int | None
    """Epochs of a short schedule; None: the whole one."""
    steps: int
    dice: dict[str, dict[str, float]]
    """Label name → case → Dice, and their mean under ``mean``; a label that is in neither is NaN."""
    dice_shifted: dict[str, dict[str, float]]
    """The same with another look; empty where the study has none."""
    pseudo_dice: list[float]
    """nnU-Net's running estimate per epoch, on patches of cases that nothing trains on."""
    seconds: dict[str, float]
    first_steps: list[dict[str, float]] = field(default_factory=list)
    """Norms of the encoder's weights and gradients in the first steps; empty where they were not noted."""

    def as_json(self) -> dict[str, Any]:
        """The run with its mean; NaN becomes ``null``."""
        values = {
            key: {
                label: {case: None if np.isnan(value) else value for case, value in cases.items()}
                for label, cases in getattr(self, key).items()
            }
            for key in LOOKS
        }
        return asdict(self) | values | {"mean_dice": float(np.nanmean(list(self.dice[ALL_LABELS].values())))}


def collect(folder: Path) -> list[Run]:
    """Every fine-tuning that has finished, by name."""
    known = [each.name for each in fields(Run)]
    found = []
    for path in sorted((folder / RUNS).glob("*.json")):
        content = {"fraction": None, "first_steps": []} | read_json(path)
        scores = {key: with_mean(content[key]) for key in LOOKS}
        found.append(Run(**{key: content[key] for key in known if key not in scores}, **scores))
    return found


def with_mean(dice: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Label → case → Dice, NaN where it is None, with the mean over the labels that a case has; empty without cases."""
    values = {
        label: {case.removesuffix(SHIFTED): float("nan") if value is None else value for case, value in cases.items()}
        for label, cases in dice.items()
        if cases
    }
    if not values:
        return {}
    cases = next(iter(values.values()))
    present = {case: [of[case] for of in values.values() if not np.isnan(of[case])] for case in cases}
    return {ALL_LABELS: {case: statistics.fmean(of) if of else float("nan") for case, of in present.items()}} | values


def read_separation(study: Study, folder: Path) -> dict[str, Any]:
    """Pretraining → token separation before and after it; empty where the study does not ask for it."""
    if study.separation is None:
        return {}
    return {name: read_json(separation_file(folder, name)) for name in study.trained}


def read_probe(folder: Path) -> dict[str, Any]:
    """What ``evaluate probe`` found of the frozen encoders; empty where the study does not ask for it."""
    return read_json(probe_file(folder)) if probe_file(folder).exists() else {}


def tuned(study: Study, runs: list[Run]) -> dict[str, dict[str, float]]:
    """Arm → recipe → mean Dice of the tuning cases that were not trained on."""
    return {
        arm.name: {
            run.recipe: float(np.nanmean(list(run.dice[ALL_LABELS].values())))
            for run in runs
            if run.fraction is None and run.arm == arm.name
        }
        for arm in study.arms
    }


def choose_recipes(study: Study, runs: list[Run]) -> dict[str, str | None]:
    """Arm → the recipe with the highest Dice on the tuning cases; the only one, or none, where there is no choice."""
    if len(study.recipes) < 2:
        return {arm.name: next(iter(study.recipes), None) for arm in study.arms}
    return {arm: max(found, key=found.__getitem__, default=None) for arm, found in tuned(study, runs).items()}


def summarise(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """For each look, fraction, arm and label: the mean Dice, its spread, and the paired difference to scratch.

    Differences are paired by seed and case, over the seeds that both arms have finished; intervals are over both.
    """
    rows = []
    for look in LOOKS:
        for fraction in study.fractions:
            for arm in study.arms:
                for label in (ALL_LABELS, *study.data.label_names):
                    own = scores_of(runs, arm, fraction, label, look=look)
                    if not own:
                        continue
                    twin = scores_of(runs, study.baseline, fraction, label, look=look)
                    together = [seed for seed in own if seed in twin]
                    per_seed = {seed: float(np.nanmean(values)) for seed, values in own.items()}
                    mae = next((each for each in study.arms if each.name == FIELD), arm)
                    of_mae = scores_of(runs, mae, fraction, label, look=look)
                    rows.append(
                        {
                            "look": LOOKS[look],
                            "fraction": fraction,
                            "labelled_cases": labelled_cases(study, fraction),
                            "arm": arm.name,
                            "label": label,
                            "mean": statistics.fmean(per_seed.values()),
                            "per_seed": per_seed,
                            "sd_over_seeds": statistics.stdev(per_seed.values()) if len(per_seed) > 1 else None,
                            "interval": _interval(np.stack(list(own.values()))),
                            "seeds": len(together),
                            "difference_to_scratch": None if arm == study.baseline else _between(own, twin),
                            "difference_to_mae": None if arm in (mae, study.baseline) else _between(own, of_mae),
                            # of the arm and of scratch, over the seeds that both have
                            "paired": [_mean_of(own, together), _mean_of(twin, together)] if together else None,
                        }
                    )
    return rows


def calibration(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """For each fraction, whether the twin from scratch has converged.

    It has where, in the mean over the seeds, the pseudo Dice gains less in the last fifth of the schedule than a third
    of the standard deviation of the final Dice between seeds. ``converged`` is None with fewer than two seeds.
    """
    rows = []
    for fraction in study.fractions:
        own = [run for run in _of(runs, study.baseline, fraction) if run.schedule is None]
        if not own:
            continue
        curves = np.array([run.pseudo_dice for run in own])
        fifth = max(1, round(curves.shape[1] / 5))
        gain = float(curves[:, -1].mean() - curves[:, max(0, curves.shape[1] - 1 - fifth)].mean())
        final = [float(np.nanmean(list(run.dice[ALL_LABELS].values()))) for run in own]
        spread = statistics.stdev(final) if len(final) > 1 else None
        rows.append(
            {
                "labelled_cases": labelled_cases(study, fraction),
                "seeds": len(own),
                "gain_in_last_fifth": gain,
                "sd_over_seeds": spread,
                "converged": None if spread is None else bool(gain < spread / 3),
            }
        )
    return rows


def steps_to_twin(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """For each arm the mean Dice after each schedule, and the shortest that has 95 % of what the twin has in the end.

    Over the seeds for which every schedule of the arm has finished.
    """
    if not any(run.schedule for run in runs):
        return []
    whole = scores_of(runs, study.baseline, study.largest, ALL_LABELS)
    if not whole:
        return []
    goal = ENOUGH * statistics.fmean(float(np.nanmean(values)) for values in whole.values())
    rows = []
    twin = _after_steps(runs, study.baseline, study.largest)
    for arm in study.arms:
        after = _after_steps(runs, arm, study.largest)
        means = {steps: _mean_of(of, list(of)) for steps, of in after.items()}
        reached = next((steps for steps, value in means.items() if value >= goal), None)
        row = {"arm": arm.name, "goal": goal, "dice_after_steps": means, "reached_after": reached}
        row["seeds"] = {steps: len(of) for steps, of in after.items()}
        shared = [steps for steps in after if steps in twin and arm != study.baseline]
        row["difference_to_scratch"] = {steps: _between(after[steps], twin[steps]) for steps in shared}
        rows.append(row)
    return rows


def _after_steps(runs: list[Run], arm: Arm, fraction: float) -> dict[int, dict[int, np.ndarray]]:
    """Steps → seed → Dice (cases,) of the trainings with a schedule of so many."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for run in sorted(_of(runs, arm, fraction), key=lambda run: run.steps):
        cases = run.dice[ALL_LABELS]
        found.setdefault(run.steps, {})[run.seed] = np.array([cases[case] for case in sorted(cases)])
    return found


def first_steps(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """For each arm the norms of the encoder's weights and gradients in the first steps, mean over whole schedules."""
    rows = []
    for arm in study.arms:
        whole = [run for run in runs if run.arm == arm.name and run.schedule is None and run.fraction is not None]
        own = [run.first_steps for run in whole if run.first_steps]
        for notes in zip(*own, strict=True):
            means = {key: statistics.fmean(note[key] for note in notes) for key in ("weights", "gradients")}
            rows.append({"arm": arm.name, "step": notes[0]["step"], "runs": len(notes)} | means)
    return rows


def labelled_cases(study: Study, fraction: float) -> int:
    """How many cases of the pool a fraction trains on."""
    return len(nested_subsets([str(i) for i in range(study.cases.pool)], [fraction])[fraction])


def summary(study: Study, result: dict[str, Any]) -> dict[str, Any]:
    """What the page of all results says of a study: small enough to be kept beside it."""
    statistics_ = [row for row in result["statistics"] if row["label"] == ALL_LABELS]
    keys = ("look", "labelled_cases", "arm", "mean", "sd_over_seeds", "seeds", "difference_to_scratch")
    keys += ("difference_to_mae", "paired")
    return {
        "name": study.name,
        "data": study.data.title,
        "metric": "Dice",
        "evaluation_cases": study.cases.evaluation,
        "rows": [{key: row[key] for key in keys} for row in statistics_],
        **{key: result[key] for key in ("calibration", "tuning", "chosen", "steps_to_twin", "cost", "versions")},
    }


def versions() -> dict[str, str]:
    """Versions of what ran, and the machine."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        **{name: version(name) for name in PACKAGES},
    }


def scores_of(runs: list[Run], arm: Arm, fraction: float, label: str, *, look: str = "dice") -> dict[int, np.ndarray]:
    """Seed → Dice (cases,) after the whole schedule, the cases sorted by name."""
    found = {}
    for run in _of(runs, arm, fraction):
        cases = getattr(run, look).get(label)
        if run.schedule is None and cases:
            found[run.seed] = np.array([cases[case] for case in sorted(cases)])
    return found


def _mean_of(scores: dict[int, np.ndarray], seeds: list[int]) -> float:
    """Mean Dice over the cases and these seeds."""
    return statistics.fmean(float(np.nanmean(scores[seed])) for seed in seeds)


def _of(runs: list[Run], arm: Arm, fraction: float) -> list[Run]:
    return [run for run in runs if run.arm == arm.name and run.fraction == fraction]


def _between(own: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> dict[str, Any] | None:
    """The paired difference over the seeds that both have."""
    together = [seed for seed in own if seed in other]
    return _interval(np.stack([own[seed] - other[seed] for seed in together])) if together else None


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Of (seeds, cases); without bounds where there is one seed."""
    found = asdict(hierarchical_bootstrap(values))
    return {key: None if np.isnan(value) else value for key, value in found.items()}
