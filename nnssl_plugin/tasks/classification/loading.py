"""A trained classifier out of its folder of results, ready to predict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.sources.description import check_plan, unreadable
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import Target, targets_from_block
from nnssl_plugin.nnunet.plans import UNBUILDABLE, build_network, input_channels
from nnssl_plugin.settings import settings_from
from nnssl_plugin.tasks.classification.batches import FOREGROUND, case_inputs
from nnssl_plugin.tasks.classification.checkpoints import FILES, FINAL
from nnssl_plugin.tasks.classification.classifier import Classifier
from nnssl_plugin.tasks.classification.losses import joint_probabilities
from nnssl_plugin.tasks.classification.settings import BLOCK, ClassificationSettings


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier in test mode, with what is needed to prepare its inputs.

    ``inputs`` and ``probabilities`` are the same functions that validation uses.
    """

    classifier: Classifier
    targets: tuple[Target, ...]
    settings: ClassificationSettings
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    mirroring_axes: tuple[int, ...]
    """Spatial axes (0 is the first after the channels) along which training mirrored; test-time flips may use them."""
    device: torch.device

    def inputs(self, data: np.ndarray, segmentation: np.ndarray | None = None) -> Tensor:
        """Windows (W, C, *patch) float32 on the CPU of one preprocessed case.

        Args:
            data: (C, *spatial), as nnU-Net's preprocessor gives it.
            segmentation: (1, *spatial) labels, where the model crops to their foreground.

        Raises:
            UserError: when the model needs the segmentation and there is none.
        """
        if self.settings.crop == FOREGROUND and segmentation is None:
            raise UserError(
                "This model looks at the box around the labels of a segmentation, and there is none.",
                "Give a segmentation per case (nnUNetv2_predict makes them), or train with crop=none.",
            )
        arguments = self.settings.input_arguments(self.configuration_manager.patch_size)
        return torch.from_numpy(case_inputs(data, segmentation, **arguments))

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> dict[str, Tensor]:
        """Target → (B, K) float32 on the CPU, of images ``x`` (B, W, C, *patch)."""
        return {name: p.cpu() for name, p in joint_probabilities(self.classifier.logits(x), self.targets).items()}


def load_classifier(
    model_folder: str | Path,
    fold: str | int,
    *,
    checkpoint: str = FILES[FINAL],
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> LoadedClassifier:
    """The classifier of one fold.

    Args:
        model_folder: ``nnUNet_results/DATASET/PretrainedClassificationTrainer__PLANS__CONFIGURATION``.
        fold: 0 … 4 or ``all``.
        checkpoint: file of the fold's folder.
        device: where it shall run.
        trust: build its network whatever class the checkpoint names.

    Raises:
        UserError: when the file is missing, damaged, or holds no classifier.
    """
    path = Path(model_folder, f"fold_{fold}", checkpoint)
    content = read_checkpoint(path, device=device)
    if BLOCK not in content:
        trainer = content.get("trainer_name", "another kind")
        raise UserError(
            f"{path} holds no classifier, but a checkpoint of {trainer}.",
            "Name a folder of results of PretrainedClassificationTrainer.",
        )
    try:
        return _built(content, path, torch.device(device), trust=trust)
    except (*UNBUILDABLE, RecursionError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from error


def _built(content: dict[str, Any], path: Path, device: torch.device, *, trust: bool) -> LoadedClassifier:
    """The classifier that a checkpoint describes, with its weights."""
    state, given = content[BLOCK], content["init_args"]
    check_plan(given["plans"], given["configuration"], path)
    targets = targets_from_block(state)
    settings = settings_from(state["settings"], ClassificationSettings(), f"the classification block of {path}")
    plans, configuration, dataset_json = given["plans"], given["configuration"], given["dataset_json"]
    classifier = Classifier(
        build_network(plans, configuration, dataset_json, trust=trust),
        input_channels=input_channels(plans, configuration, dataset_json),
        heads={target.name: target.outputs for target in targets},
        stages=settings.stages,
    )
    classifier.load_state_dict(content["network_weights"])
    manager = PlansManager(plans)
    return LoadedClassifier(
        classifier.to(device).eval(),
        targets,
        settings,
        manager,
        manager.get_configuration(configuration),
        dataset_json,
        tuple(content["inference_allowed_mirroring_axes"] or ()),
        device,
    )
