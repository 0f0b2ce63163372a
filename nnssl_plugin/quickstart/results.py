"""Reads the numbers of a finished quickstart from the files that nnU-Net and the trainers wrote."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart.scans import Selection
from nnssl_plugin.quickstart.steps import ARMS, fold_folder
from nnssl_plugin.statistics.bootstrap import Interval, paired_bootstrap

ALL_LABELS = "mean of the labels"


@dataclass(frozen=True)
class Scores:
    """Dice of the test cases."""

    cases: tuple[str, ...]
    labels: tuple[str, ...]
    dice: dict[str, np.ndarray]
    """Arm → (cases, labels) in [0, 1], NaN where neither truth nor prediction has the label."""

    def of(self, arm: str, label: str) -> np.ndarray:
        """Scores (cases,) of one label, or of :data:`ALL_LABELS`: the mean of a case over the labels that count."""
        if label != ALL_LABELS:
            return self.dice[arm][:, self.labels.index(label)]
        counted = ~np.isnan(self.dice[arm])
        total = np.where(counted, self.dice[arm], 0).sum(1)
        return np.where(counted.any(1), total / counted.sum(1).clip(1), np.nan)


@dataclass(frozen=True)
class Spread:
    """How scores spread over cases; NaN is left out, and everything is NaN without a score."""

    mean: float
    sd: float
    """Sample standard deviation, NaN with fewer than two cases."""
    low: float
    high: float


def read_scores(folder: Path, selection: Selection) -> Scores:
    """Dice from the ``summary.json`` of both arms, in the order of the selection's test cases."""
    dice = {}
    for arm in ARMS:
        rows = {
            Path(entry["reference_file"]).name.removesuffix(".nii.gz"): entry["metrics"]
            for entry in read_json(folder / "predictions" / arm / "summary.json")["metric_per_case"]
        }
        dice[arm] = np.array(
            [[rows[case][str(value)]["Dice"] for value in selection.labels.values()] for case in selection.test],
            dtype=float,
        )
    return Scores(selection.test, tuple(selection.labels), dice)


def spread(scores: np.ndarray) -> Spread:
    """Mean, standard deviation and range of the scores (cases,)."""
    counted = scores[~np.isnan(scores)]
    if not len(counted):
        return Spread(np.nan, np.nan, np.nan, np.nan)
    sd = float(counted.std(ddof=1)) if len(counted) > 1 else np.nan
    return Spread(float(counted.mean()), sd, float(counted.min()), float(counted.max()))


def difference(scores: Scores, label: str) -> Interval:
    """Pretrained minus scratch, paired by case, with its bootstrap interval."""
    return paired_bootstrap(scores.of(ARMS[0], label), scores.of(ARMS[1], label))


def describe_dice(folder: Path, selection: Selection) -> list[str]:
    """A few lines for the terminal; none where the pipeline had no labels."""
    if not selection.test:
        return []
    scores = read_scores(folder, selection)
    lines = [
        f"Mean foreground Dice on {len(scores.cases)} test cases (it shows that the pipeline works, not what "
        "pretraining brings):"
    ]
    for arm in ARMS:
        s = spread(scores.of(arm, ALL_LABELS))
        lines.append(f"  {arm:<10} {s.mean:.3f} (SD {s.sd:.3f}, {s.low:.3f} to {s.high:.3f})")
    return lines


def read_history(folder: Path, arm: str | None = None) -> dict[str, list]:
    """What was logged per epoch: in an arm of the fine-tuning, or in the pretraining."""
    from nnssl_plugin.checkpoints.format.files import read_checkpoint  # PyTorch takes seconds to import

    return read_checkpoint(fold_folder(folder, arm) / "checkpoint_final.pth")["logging"]
