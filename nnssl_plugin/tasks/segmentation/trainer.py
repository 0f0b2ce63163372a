"""Fine-tuning of pretrained weights for segmentation, as the plan's ``finetuning`` block says."""

import random
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl_plugin.finetuning.parameter_groups import rest_at_test_mode
from nnssl_plugin.finetuning.settings import FinetuningSettings, read_settings, settings_of
from nnssl_plugin.finetuning.weights import load_planned_weights, planned_optimisation
from nnssl_plugin.networks.fast_blocks import use_fast_blocks
from nnssl_plugin.networks.recomputing import recompute_activations
from nnssl_plugin.training.interruption import TO_BE_CONTINUED
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE
from nnssl_plugin.training.resumable import ResumableTrainer


class PretrainedSegmentationTrainer(ResumableTrainer):
    """nnU-Net's trainer from pretrained weights: warm-up, then the planned schedule.

    The weights are loaded when a training starts, not when it is resumed, validated or used for prediction. What
    pretraining did not train keeps the initialisation of this run, so folds differ in it as they do in nnU-Net.

    A run that goes on in the middle of an epoch runs the rest of it, on other batches than it would have seen, because
    nnU-Net's loader is unordered.

    Raises:
        UserError: when the plan has no ``finetuning`` block, or one that does not fit.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = DEFAULT_DEVICE,
    ):
        # first: a plan that does not fit leaves no folder behind
        self.settings: FinetuningSettings = read_settings(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.settings.epochs or self.num_epochs
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch or self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.validation_iterations or self.num_val_iterations_per_epoch
        self.save_every = sys.maxsize  # checkpoint_latest.pth is written by end_epoch
        self._log_settings()

    def initialize(self):
        self._seed(0)
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The planned network, with fast blocks where the plan says so; nnU-Net's prediction asks here, too."""
        network = ResumableTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        settings = settings_of(plans_manager.plans)
        if settings.fast:
            use_fast_blocks(network)
        if settings.recompute:
            recompute_activations(network)
        return network

    def configure_optimizers(self):
        optimizer, schedule = planned_optimisation(self.saved_network(), self.settings, epochs=self.num_epochs)
        self.initial_lr, self.weight_decay = schedule.lr, optimizer.defaults["weight_decay"]
        return optimizer, schedule

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if self.current_epoch == 0 and self.step == 0 and self.settings.weights is not None:
            self.load_pretrained_weights()
        if self.step > 0:
            self._seed(self.step)
        super().on_train_start()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        rest_at_test_mode(self.saved_network())
        groups = self.optimizer.param_groups
        if len(groups) > 1:
            rates = ", ".join(f"{group['name']} {np.round(group['lr'], 6)}" for group in groups)
            self.print_to_log_file(f"Learning rates: {rates}")

    def on_train_epoch_end(self, train_outputs):
        """nnU-Net's mean loss, over the steps before a stop in this epoch, too."""
        super().on_train_epoch_end([{"loss": loss} for loss in self.epoch_losses])
        self.epoch_losses = []

    def on_epoch_end(self):
        super().on_epoch_end()
        self.end_epoch()

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's, unless the run was asked to stop in its last epoch: then ``--c`` does it."""
        if self._should_stop(now=True):
            self.print_to_log_file("Trained to the end; the same command with --c goes on with the validation.")
            sys.exit(TO_BE_CONTINUED)
        super().perform_actual_validation(save_probabilities)

    def load_pretrained_weights(self) -> None:
        """Put the plan's weights into the network and log how much of it they cover.

        Raises:
            UserError: when the file is missing or unreadable, or covers less of the encoder than when it was written.
        """
        path = Path(self.preprocessed_dataset_folder_base, self.settings.weights)
        report = load_planned_weights(self.saved_network(), path, plans_name=self.plans_manager.plans_name)
        self.print_to_log_file(f"Loaded pretrained weights from {path}\n{report.table()}", add_timestamp=False)

    def _seed(self, step: int) -> None:
        """Where the plan has a seed: equal runs start alike, and one that goes on does not repeat its first batches."""
        if self.settings.seed is None:
            return
        entropy = np.random.SeedSequence([self.settings.seed, step])
        seed = int(entropy.generate_state(1)[0]) if step else self.settings.seed
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _log_settings(self) -> None:
        changed = [
            f"{f.name}: {f.default} → {getattr(self.settings, f.name)}"
            for f in fields(self.settings)
            if getattr(self.settings, f.name) != f.default
        ]
        self.print_to_log_file(
            "Fine-tuning settings that differ from the default:\n" + ("\n".join(changed) or "none"), add_timestamp=False
        )
