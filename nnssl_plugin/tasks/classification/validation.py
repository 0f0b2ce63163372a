"""A classifier's predictions of the validation cases, gathered batch by batch, and their metrics."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.nnunet.case_labels import Target


class ClassValidation:
    """Gathers probabilities and labels, case by case; metrics come from ``summary``.

    Args:
        targets: what is predicted.
        subjects: case → subject.
    """

    def __init__(self, targets: Sequence[Target], subjects: Mapping[str, str]):
        self.targets = tuple(targets)
        self.subjects = subjects
        self.cases: list[str] = []
        self._losses: list[Tensor] = []
        self._probabilities: dict[str, list[Tensor]] = {target.name: [] for target in targets}
        self._labels: dict[str, list[Tensor]] = {target.name: [] for target in targets}
        self._metrics: dict[str, float] | None = None

    def add(
        self, cases: Sequence[str], probabilities: Mapping[str, Tensor], labels: Sequence[Tensor], *, loss: Tensor
    ) -> None:
        """Add a batch.

        Args:
            cases: B names.
            probabilities: target → (B, K).
            labels: one tensor per target, as the losses take them.
            loss: () mean over the batch.
        """
        self.cases += cases
        self._losses.append(loss.detach().float() * len(cases))
        for target, label in zip(self.targets, labels, strict=True):
            self._probabilities[target.name].append(probabilities[target.name])
            self._labels[target.name].append(label)

    def metrics(self) -> dict[str, float]:
        """``val_losses``, ``auroc`` and ``balanced_accuracy``, means over the targets for which they are defined (NaN
        where there is none); with several targets also ``auroc/TARGET`` and ``balanced_accuracy/TARGET``."""
        if self._metrics is None:
            self._metrics = self._computed()
        return self._metrics

    def has_auroc(self) -> bool:
        """Whether AUROC is defined: some validation cases differ in a class."""
        return not math.isnan(self.metrics()["auroc"])

    def score(self) -> tuple[float, float]:
        """What epochs are compared by, larger is better: AUROC (0 where it is not defined), then the negative loss."""
        metrics = self.metrics()
        return (metrics["auroc"] if self.has_auroc() else 0.0, -metrics["val_losses"])

    def write(self, folder: Path, *, checkpoint: str) -> list[str]:
        """Write tables, summaries and figures; returns a line for the log per target.

        Args:
            folder: where to.
            checkpoint: ``final`` or ``best``, whose predictions they are.
        """
        from nnssl_plugin.tasks.classification.summary import write_validation

        lines = []
        subjects = [self.subjects[case] for case in self.cases]
        for target in self.targets:
            summary = write_validation(
                folder, target, self.cases, subjects, *self._arrays(target), targets=self.targets, checkpoint=checkpoint
            )
            shown = ", ".join(
                f"{name.replace('_', ' ')} {_shown(summary.get(name))}"
                for name in ("auroc", "balanced_accuracy", "accuracy")
            )
            lines.append(f"Validation of {target.name}, {len(self.cases)} cases: {shown}; see {folder}")
        return lines

    def _computed(self) -> dict[str, float]:
        from nnssl_plugin.tasks.classification.summary import class_summary

        subjects = [self.subjects[case] for case in self.cases]
        found = {"val_losses": float(torch.stack(self._losses).sum()) / len(self.cases)}
        summaries = {
            target.name: class_summary(*self._arrays(target), target=target, subjects=subjects)
            for target in self.targets
        }
        for name in ("auroc", "balanced_accuracy"):
            values = {target: _number(summary.get(name)) for target, summary in summaries.items()}
            defined = [value for value in values.values() if not math.isnan(value)]
            found[name] = sum(defined) / len(defined) if defined else math.nan
            if len(values) > 1:
                found |= {f"{name}/{target}": value for target, value in values.items()}
        return found

    def _arrays(self, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """Labels and probabilities of all cases."""
        labels, probabilities = self._labels[target.name], self._probabilities[target.name]
        return torch.cat(labels).cpu().numpy(), torch.cat(probabilities).float().cpu().numpy()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
