"""What came out of a study, in words and tables: the page for the documentation."""

from pathlib import Path
from typing import Any

from study_file import Study
from study_prediction import prediction_table
from study_results import ALL_LABELS, ENOUGH, FIELD, LOOKS, PACKAGES, labelled_cases

from nnssl_plugin.tasks.probing.probe import voxel_table
from nnssl_plugin.tasks.probing.tokens import table as separation_table


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

{_curve(study)}![Pseudo Dice per epoch](learning.png)

{_calibration(result["calibration"])}

{_beside_mae(result["statistics"])}{_tuning(study, result)}{_steps(result["steps_to_twin"])}{_first_steps(result["first_steps"])}{_probe(study, result)}{separation}**Setting.** Fine-tuning: {epochs} epochs of {steps} steps ({_edits(study.finetuning)}). Plan: {_edits(study.plan)}.{captions} Pretraining:

{pretrained or "- none"}

```bash
python benchmarks/label_efficiency.py benchmarks/studies/{study_file.name} -o {study.name} --jobs {result["setting"]["jobs"]} --device {result["setting"]["device"]}
```

**Cost.** {cost["cpu_minutes"]:.1f} CPU minutes in all ({stages}), with {used} on {result["versions"]["cores"]} cores.
"""  # noqa: E501 (paragraphs of a page)


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


def _curve(study: Study) -> str:
    """The figure over numbers of labelled cases, where there are several."""
    if len(study.fractions) == 1:
        return ""
    return "![Dice against the number of labelled cases](label_efficiency.png)\n\n"


def _beside_mae(rows: list[dict[str, Any]]) -> str:
    """The differences to the arm of masked reconstruction, where there are any."""
    found = [row for row in rows if row["label"] == ALL_LABELS and row["difference_to_mae"] is not None]
    if not found:
        return ""
    lines = [_row(["arm", "labelled cases", "images", f"beside {FIELD} (95 % interval)"]), _row(["---"] * 4)]
    for row in found:
        shown = _difference(row["difference_to_mae"])
        lines.append(_row([row["arm"], str(row["labelled_cases"]), row["look"], shown]))
    return f"**Beside {FIELD}.**\n\n" + "\n".join(lines) + "\n\n"


def _first_steps(rows: list[dict[str, Any]]) -> str:
    """Norms of weights and gradients of the encoder at the first, the middle and the last of the noted steps."""
    if not rows:
        return ""
    noted = sorted({row["step"] for row in rows})
    shown = [noted[0], noted[len(noted) // 2], noted[-1]]
    found = {(row["arm"], row["step"]): row for row in rows}
    kinds = ("weights", "gradients")
    lines = [_row(["arm", *(f"{kind}, step {step}" for kind in kinds for step in shown)])]
    lines.append(_row(["---"] * (1 + len(kinds) * len(shown))))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        lines.append(_row([arm, *(f"{found[arm, step][kind]:.2f}" for kind in kinds for step in shown)]))
    return "**Norms of the encoder's weights and gradients** in the first steps.\n\n" + "\n".join(lines) + "\n\n"


def _probe(study: Study, result: dict[str, Any]) -> str:
    """What the frozen encoders hold, and which number told how well they would fine-tune."""
    if not result["probe"]:
        return ""
    labelled = {fraction: labelled_cases(study, fraction) for fraction in study.fractions}
    told = prediction_table(study, result["prediction"], labelled)
    return f"""**Frozen features:** a linear readout of each encoder, on tuning cases.

{voxel_table(result["probe"])}

**What tells how well a pretraining will fine-tune?** Spearman's ρ, over the pretrainings of a method, of its length, of each number that it logged last and of the readout above, with the gain over scratch on the evaluation cases.

{told}
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
    for row in rows:
        for step, difference in row["difference_to_scratch"].items():
            if int(step) != steps[-1]:
                head.append(f"\n{row['arm']} − scratch after {step} steps: {_difference(difference)}.")
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
