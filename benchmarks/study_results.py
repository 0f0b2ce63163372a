"""What came out of a study: Dice per run, case and label; statistics; the table and the page."""

import os
import platform
import statistics
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from study_file import SHIFTED, Arm, Study
from study_steps import RUNS, separation_file

from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.label_fractions import nested_subsets
from nnssl_plugin.statistics.bootstrap import hierarchical_bootstrap
from nnssl_plugin.tasks.probing.tokens import table as separation_table

ALL_LABELS = "mean"
"""Name of the mean over the labels of a case."""
PACKAGES = ("nnssl_plugin", "nnunetv2", "torch", "numpy")


LOOKS = {"dice": "as trained", "dice_shifted": "another look"}
"""Where a run keeps the Dice of the evaluation cases, and how they look there."""
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
    known = [field.name for field in fields(Run)]
    found = []
    for path in sorted((folder / RUNS).glob("*.json")):
        content = {"fraction": None} | read_json(path)
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
                    difference = None
                    if arm != study.baseline and together:
                        difference = _interval(np.stack([own[seed] - twin[seed] for seed in together]))
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
                            "difference_to_scratch": difference,
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
    for arm in study.arms:
        after: dict[int, list[float]] = {}
        for run in _of(runs, arm, study.largest):
            after.setdefault(run.steps, []).append(float(np.nanmean(list(run.dice[ALL_LABELS].values()))))
        means = {steps: statistics.fmean(values) for steps, values in sorted(after.items())}
        reached = next((steps for steps, value in means.items() if value >= goal), None)
        seeds = {steps: len(values) for steps, values in sorted(after.items())}
        rows.append(
            {"arm": arm.name, "goal": goal, "dice_after_steps": means, "seeds": seeds, "reached_after": reached}
        )
    return rows


def labelled_cases(study: Study, fraction: float) -> int:
    """How many cases of the pool a fraction trains on."""
    return len(nested_subsets([str(i) for i in range(study.cases.pool)], [fraction])[fraction])


def table(study: Study, rows: list[dict[str, Any]]) -> str:
    """The statistics as Markdown: a row for each look, label and fraction."""
    arms = [arm.name for arm in study.arms]
    others = [arm for arm in arms if arm != study.baseline.name]
    differences = [f"{name} − {study.baseline.name} (95 % interval)" for name in others]
    lines = [_row(["images", "labels", "labelled cases", *arms, *differences])]
    lines.append(_row(["---"] * lines[0].count(" | ") + ["---"]))
    for look in LOOKS.values():
        for label in (ALL_LABELS, *study.data.label_names):
            for fraction in study.fractions:
                found = {
                    row["arm"]: row
                    for row in rows
                    if (row["look"], row["fraction"], row["label"]) == (look, fraction, label)
                }
                if found:
                    cells = [_mean(found.get(arm)) for arm in arms]
                    cells += [_difference(found.get(name, {}).get("difference_to_scratch")) for name in others]
                    lines.append(_row([look, label, str(labelled_cases(study, fraction)), *cells]))
    return "\n".join(lines) + "\n"


def summary(study: Study, result: dict[str, Any]) -> dict[str, Any]:
    """What the page of all results says of a study: small enough to be kept beside it."""
    statistics_ = [row for row in result["statistics"] if row["label"] == ALL_LABELS]
    keys = ("look", "labelled_cases", "arm", "mean", "sd_over_seeds", "seeds", "difference_to_scratch", "paired")
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


def page(study: Study, result: dict[str, Any], lines: str, *, study_file: Path) -> str:
    """A page for the documentation: question, data, calibration, numbers, setting, command, cost."""
    counts, cost, data = study.cases, result["cost"], study.data
    epochs, steps = (study.finetuning.get(key, "nnU-Net's") for key in ("epochs", "iterations_per_epoch"))
    stages = ", ".join(
        f"{name.removeprefix('cpu_minutes_')} {value:.1f}"
        for name, value in cost.items()
        if name.startswith("cpu_minutes_")
    )
    used = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if name in PACKAGES)
    pretrained = "\n".join(
        f"- `{name}`: {each.trainer}{f', preset {each.preset}' if each.preset else ''}, {_edits(each.edits)}"
        for name, each in study.pretrainings.items()
    )
    separation = "".join(_separation(name, found) for name, found in result["separation"].items())
    captions = f" Captions: {_edits(study.captions)}." if study.captions is not None else ""
    return f"""# {study.name}

**Question.** {study.question}

**Data.** {data.title}; {data.licence}; labels: {data.label_kind} ({", ".join(data.label_names)}). {counts.unlabelled} scans for pretraining, of which up to {counts.pool} come with labels; {counts.evaluation} other cases for evaluation and {counts.tuning} for tuning, which neither pretraining nor fine-tuning sees.{_shift(study)}

{lines}
Mean Dice over the evaluation cases and up to {len(study.seeds)} seeds ± standard deviation over the seeds. A seed draws the labelled cases, the initialisation and the augmentation, alike in every arm. Differences are paired by seed and case; the interval draws seeds and cases (hierarchical bootstrap){_pretrainings(study)}. The final weights are evaluated, no checkpoint is selected.

![Dice against the number of labelled cases](label_efficiency.png)

![Pseudo Dice per epoch](learning.png)

{_calibration(result["calibration"])}

{_tuning(study, result)}{_steps(result["steps_to_twin"])}{separation}**Setting.** Fine-tuning: {epochs} epochs of {steps} steps ({_edits(study.finetuning)}). Plan: {_edits(study.plan)}.{captions} Pretraining:

{pretrained or "- none"}

```bash
python benchmarks/label_efficiency.py benchmarks/studies/{study_file.name} -o {study.name} --jobs {result["setting"]["jobs"]} --device {result["setting"]["device"]}
```

**Cost.** {cost["cpu_minutes"]:.1f} CPU minutes in all ({stages}), with {used} on {result["versions"]["cores"]} cores.
"""  # noqa: E501 (paragraphs of a page)


def _shift(study: Study) -> str:
    if study.shift is None:
        return ""
    return (
        f" They are segmented a second time with another look: intensities between the 0.5th and 99.5th percentile to "
        f"the power of {study.shift.gamma:g}, averaged over blocks of {study.shift.coarser} voxels along each axis."
    )


def _calibration(rows: list[dict[str, Any]]) -> str:
    """Whether the twin converged, as a paragraph."""
    said = []
    for row in rows:
        if row["converged"] is None:
            said.append(f"{row['labelled_cases']} labels: not known from one seed")
            continue
        verb = "converged" if row["converged"] else "**not converged**"
        said.append(
            f"{row['labelled_cases']} labels: {verb}, the last fifth of the schedule gained "
            f"{row['gain_in_last_fifth']:+.4f}, the standard deviation between {row['seeds']} seeds is "
            f"{row['sd_over_seeds']:.4f}"
        )
    return (
        f"**Calibration.** {'; '.join(said)}. It counts as converged where the gain (pseudo Dice) is below a third "
        "of that spread."
    )


def _tuning(study: Study, result: dict[str, Any]) -> str:
    """The table of recipes, and which one each arm took."""
    if len(study.recipes) < 2:
        return ""
    head = [_row(["arm", *study.recipes]), _row(["---"] * (len(study.recipes) + 1))]
    for arm, found in result["tuning"].items():
        values = [f"{found[recipe]:.3f}" if recipe in found else "–" for recipe in study.recipes]
        chosen = result["chosen"].get(arm)
        head.append(
            _row([arm, *(f"**{v}**" if r == chosen else v for r, v in zip(study.recipes, values, strict=True))])
        )
    recipes = "; ".join(f"`{name}`: {_edits(settings)}" for name, settings in study.recipes.items())
    return (
        f"**Recipes,** chosen for each arm on tuning cases, one training each (mean Dice; bold: taken). {recipes}.\n\n"
        + "\n".join(head)
        + "\n\n"
    )


def _steps(rows: list[dict[str, Any]]) -> str:
    """The table of the short schedules."""
    if not rows:
        return ""
    steps = sorted({int(step) for row in rows for step in row["dice_after_steps"]})
    head = [_row(["arm", *(f"{step} steps" for step in steps), "reached after"])]
    head.append(_row(["---"] * (len(steps) + 2)))
    for row in rows:
        values = [f"{row['dice_after_steps'][step]:.3f}" if step in row["dice_after_steps"] else "–" for step in steps]
        head.append(_row([row["arm"], *values, str(row["reached_after"] or "none of them")]))
    return (
        "**Steps to the result from scratch.** Trainings with schedules of their own; the goal is "
        f"{rows[0]['goal']:.3f}, "
        f"{ENOUGH:.0%} of what training from scratch has after the whole schedule.\n\n" + "\n".join(head) + "\n\n"
    )


def _pretrainings(study: Study) -> str:
    """What the interval holds of the spread between pretrainings."""
    if study.pretraining_seeds == 1:
        return ", each arm having one pretraining"
    return f"; each pretraining was done with {study.pretraining_seeds} seeds, one for each seed of the fine-tuning"


def _separation(name: str, found: dict[str, Any]) -> str:
    """The paragraph of the page on what the features of a pretraining tell apart."""
    size = "×".join(str(tokens) for tokens in found["grid"])
    return f"""**What the features tell apart** before (random initialisation) and after the pretraining `{name}`: tokens of the encoder at stride {found["stride"]} ({size} in a window around a labelled voxel of each evaluation case), by the label of most of their voxels.

{separation_table(found)}

"""  # noqa: E501 (paragraphs of a page)


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


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Of (seeds, cases); without bounds where there is one seed."""
    found = asdict(hierarchical_bootstrap(values))
    return {key: None if np.isnan(value) else value for key, value in found.items()}


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    spread = row["sd_over_seeds"]
    return f"{row['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _difference(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['mean']:+.3f} (one seed)"
    return f"{interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def _edits(edits: dict[str, Any]) -> str:
    return ", ".join(f"`{key.rpartition('.')[2]}` {value}" for key, value in edits.items()) or "none"
