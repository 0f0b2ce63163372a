"""The classifiers of the folds, with the mean of their probabilities."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.tasks.classification.loading import LoadedClassifier, load_classifier


@dataclass(frozen=True)
class Ensemble:
    """Classifiers of one training, whose probabilities are averaged."""

    models: tuple[LoadedClassifier, ...]
    mirroring: bool
    """Whether each image is also shown mirrored along every combination of the axes that training mirrored."""

    @property
    def first(self) -> LoadedClassifier:
        """All models share its targets, plan and inputs."""
        return self.models[0]

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is predicted."""
        return self.first.targets

    def inputs(self, data: np.ndarray, segmentation: np.ndarray | None = None) -> Tensor:
        """Windows (W, C, *patch) of a preprocessed case (C, *spatial)."""
        return self.first.inputs(data, segmentation)

    def probabilities(self, x: Tensor) -> dict[str, Tensor]:
        """Target → (B, K), the mean over models and mirrorings, of images ``x`` (B, W, C, *patch)."""
        axes = self.first.mirroring_axes if self.mirroring else ()
        flips = [flip for number in range(len(axes) + 1) for flip in itertools.combinations(axes, number)]
        probabilities = [
            model.probabilities(torch.flip(x, [axis + 3 for axis in flip]) if flip else x)
            for flip in flips
            for model in self.models
        ]
        return {
            target.name: torch.stack([each[target.name] for each in probabilities]).mean(0) for target in self.targets
        }


def find_trained_folds(model_folder: str | Path, checkpoint: str) -> list[str]:
    """Numbers of the folds that have the checkpoint; ``all`` where there is no numbered one.

    Raises:
        UserError: there is no such folder, or no fold has it.
    """
    model_folder = Path(model_folder)
    present = sorted(path.parent.name[5:] for path in model_folder.glob(f"fold_*/{checkpoint}"))
    numbered = sorted((fold for fold in present if fold.isdigit()), key=int)
    if not present:
        raise UserError(
            f"No fold of {model_folder} has a {checkpoint}.",
            "Name the folder of a training (…/PretrainedClassificationTrainer__PLANS__CONFIG) with -m, finish the "
            "training (nnUNetv2_train … --c), or take the best epoch so far: --checkpoint best",
        )
    return numbered or ["all"]


def load_ensemble(
    model_folder: str | Path,
    folds: Sequence[str | int],
    *,
    checkpoint: str,
    mirroring: bool = False,
    device: str = "cpu",
    trust: bool = False,
) -> Ensemble:
    """Load the classifiers of folds.

    Args:
        model_folder: ``nnUNet_results/DATASET/PretrainedClassificationTrainer__PLANS__CONFIG``.
        folds: numbers, or ``all``.
        checkpoint: file of the folds' folders.
        mirroring: see :class:`Ensemble`.
        device: where they run.
        trust: build their network whatever its class.

    Raises:
        UserError: one is missing or damaged, or they do not belong together.
    """
    models = tuple(
        load_classifier(model_folder, fold, checkpoint=checkpoint, device=device, trust=trust) for fold in folds
    )
    for fold, model in zip(folds, models, strict=True):
        if _seen_by(model) != _seen_by(models[0]):
            raise UserError(
                f"Folds {folds[0]} and {fold} of {model_folder} differ in targets, patch or inputs.",
                "Name folds that were trained with one plan with -f.",
            )
    return Ensemble(models, mirroring)


def _seen_by(model: LoadedClassifier) -> tuple:
    """What models must share to be shown the same."""
    configuration = model.configuration_manager
    return (
        model.targets,
        model.settings.input_arguments(configuration.patch_size),
        list(configuration.spacing),
        configuration.normalization_schemes,
    )
