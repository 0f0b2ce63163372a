"""What came out of a study: Dice per run, case and label; statistics; the table and the page."""

import os
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from study_file import ENDING, Arm, Study
from study_steps import fold_folder, separation_file

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.label_fractions import nested_subsets
from nnssl_plugin.statistics.bootstrap import paired_bootstrap
from nnssl_plugin.tasks.probing.tokens import table as separation_table

ALL_LABELS = "mean"
"""Name of the mean over the labels of a case."""
PACKAGES = ("nnssl_plugin", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its result on the evaluation cases."""

    arm: str
    seed: int
    fraction: float
    dice: dict[str, dict[str, float]]
    """Label name → case → Dice; a label that neither prediction nor reference holds is NaN."""
    pseudo_dice: list[float]
    """nnU-Net's running estimate on patches of the evaluation cases, per epoch."""

    def as_json(self) -> dict[str, Any]:
        """The run with its means; NaN becomes ``null``."""
        dice = {
            label: {case: None if np.isnan(value) else value for case, value in cases.items()}
            for label, cases in self.dice.items()
        }
        return asdict(self) | {"dice": dice, "mean_dice": float(np.nanmean(list(self.dice[ALL_LABELS].values())))}


def collect(study: Study, folder: Path) -> list[Run]:
    """Every fine-tuning of a study, read from nnU-Net's files."""
    runs = []
    for fold, (seed, fraction) in enumerate(study.folds):
        for arm in study.arms:
            place = fold_folder(study, folder, arm, fold)
            logged = read_checkpoint(place / "checkpoint_final.pth")["logging"]["mean_fg_dice"]
            dice = read_dice(place / "validation" / "summary.json", study.data.label_names)
            runs.append(Run(arm.name, seed, fraction, dice, [float(value) for value in logged]))
    return runs


def read_dice(path: Path, label_names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Label name → case → Dice of nnU-Net's ``summary.json``, and their mean per case."""
    dice: dict[str, dict[str, float]] = {name: {} for name in (ALL_LABELS, *label_names)}
    for entry in read_json(path)["metric_per_case"]:
        case = Path(entry["reference_file"]).name.removesuffix(ENDING)
        values = [float(entry["metrics"][str(label)]["Dice"]) for label in range(1, len(label_names) + 1)]
        for name, value in zip(label_names, values, strict=True):
            dice[name][case] = value
        present = [value for value in values if not np.isnan(value)]
        dice[ALL_LABELS][case] = statistics.fmean(present) if present else float("nan")
    return dice


def read_separation(study: Study, folder: Path) -> dict[str, Any]:
    """Pretraining → token separation before and after it; empty where the study does not ask for it."""
    if study.separation is None:
        return {}
    return {name: read_json(separation_file(folder, name)) for name in study.pretrainings}


def summarise(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """For each fraction, arm and label: the mean Dice, its spread, and the paired difference to the arm from scratch.

    Intervals are over cases, each averaged over the seeds first, as the same cases are segmented under every seed.
    """
    rows = []
    for fraction in study.fractions:
        for arm in study.arms:
            for label in (ALL_LABELS, *study.data.label_names):
                own = _scores(runs, arm, fraction, label)
                per_seed = np.nanmean(own, axis=1)
                by_case = _mean_over_seeds(own)
                difference = None
                if arm != study.baseline:
                    other = _mean_over_seeds(_scores(runs, study.baseline, fraction, label))
                    difference = asdict(paired_bootstrap(by_case, other))
                rows.append(
                    {
                        "fraction": fraction,
                        "labelled_cases": labelled_cases(study, fraction),
                        "arm": arm.name,
                        "label": label,
                        "mean": float(np.nanmean(own)),
                        "per_seed": per_seed.tolist(),
                        "sd_over_seeds": statistics.stdev(per_seed.tolist()) if len(per_seed) > 1 else None,
                        "interval_over_cases": asdict(paired_bootstrap(by_case, np.zeros_like(by_case))),
                        "difference_to_scratch": difference,
                    }
                )
    return rows


def labelled_cases(study: Study, fraction: float) -> int:
    """How many cases of the pool a fraction trains on."""
    return len(nested_subsets([str(i) for i in range(study.cases.pool)], [fraction])[fraction])


def table(study: Study, rows: list[dict[str, Any]]) -> str:
    """The statistics as Markdown: a row for each fraction, and the same for each label."""
    others = [arm.name for arm in study.arms if arm != study.baseline]
    head = [
        "labels",
        "labelled cases",
        *(arm.name for arm in study.arms),
        *(f"{name} − {study.baseline.name} (95 % interval)" for name in others),
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for label in (ALL_LABELS, *study.data.label_names):
        for fraction in study.fractions:
            found = {row["arm"]: row for row in rows if row["fraction"] == fraction and row["label"] == label}
            lines.append(
                _row(
                    [
                        label,
                        str(found[study.baseline.name]["labelled_cases"]),
                        *(_mean(found[arm.name]) for arm in study.arms),
                        *(_difference(found[name]["difference_to_scratch"]) for name in others),
                    ]
                )
            )
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Versions of what ran, and the machine."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        **{name: version(name) for name in PACKAGES},
    }


def page(study: Study, result: dict[str, Any], lines: str, *, study_file: Path) -> str:
    """A page for the documentation: question, data, setting, numbers, command, cost."""
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

**Data.** {data.title}; {data.licence}; labels: {data.label_kind} ({", ".join(data.label_names)}). {counts.unlabelled} scans for pretraining, of which up to {counts.pool} come with labels; {counts.evaluation} other cases for evaluation, which neither pretraining nor fine-tuning sees.

{lines}
Mean Dice over the evaluation cases and {len(study.seeds)} seeds ± standard deviation over the seeds. A seed draws the labelled cases, the initialisation and the augmentation, alike in every arm. Differences are paired by case, each case averaged over the seeds; the interval is a percentile bootstrap over cases, so it does not hold the spread between pretrainings. The final checkpoint is evaluated, no checkpoint is selected on the evaluation cases.

![Dice against the number of labelled cases](label_efficiency.png)

![Pseudo Dice per epoch](learning.png)

{separation}**Setting.** Fine-tuning: {epochs} epochs of {steps} steps ({_edits(study.finetuning)}). Plan: {_edits(study.plan)}.{captions} Pretraining:

{pretrained or "- none"}

```bash
python benchmarks/label_efficiency.py benchmarks/studies/{study_file.name} -o {study.name} --jobs {result["setting"]["jobs"]} --device {result["setting"]["device"]}
```

**Cost.** {cost["cpu_minutes"]:.1f} CPU minutes in all ({stages}), with {used} on {result["versions"]["cores"]} cores.
"""  # noqa: E501 (paragraphs of a page)


def _separation(name: str, found: dict[str, Any]) -> str:
    """The paragraph of the page on what the features of a pretraining tell apart."""
    size = "×".join(str(tokens) for tokens in found["grid"])
    return f"""**What the features tell apart** before (random initialisation) and after the pretraining `{name}`: tokens of the encoder at stride {found["stride"]} ({size} in a window around a labelled voxel of each evaluation case), by the label of most of their voxels.

{separation_table(found)}

"""  # noqa: E501 (paragraphs of a page)


def _scores(runs: list[Run], arm: Arm, fraction: float, label: str) -> np.ndarray:
    """(seeds, cases), the cases sorted by name."""
    chosen = [run.dice[label] for run in runs if run.arm == arm.name and run.fraction == fraction]
    return np.array([[cases[case] for case in sorted(cases)] for cases in chosen])


def _mean_over_seeds(scores: np.ndarray) -> np.ndarray:
    """(cases,); a case that a seed has no score for is left out of the pairs."""
    return scores.mean(axis=0)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(row: dict[str, Any]) -> str:
    spread = row["sd_over_seeds"]
    return f"{row['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _difference(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def _edits(edits: dict[str, Any]) -> str:
    return ", ".join(f"`{key.rpartition('.')[2]}` {value}" for key, value in edits.items()) or "none"
