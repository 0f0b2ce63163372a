"""Fine-tuning of pretrained weights for segmentation, as the plan's ``finetuning`` block says."""

import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnssl_plugin.finetuning.parameter_groups import rest_at_test_mode
from nnssl_plugin.finetuning.settings import FinetuningSettings, read_settings
from nnssl_plugin.finetuning.weights import load_planned_weights, planned_optimisation
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE, PlannedNetworkTrainer

CHECKPOINTS_PER_RUN = 20
"""Least number of times that ``checkpoint_latest.pth`` is written: every 50 of 1000 epochs, as in nnU-Net, and more
often in short runs, so that ``--c`` never repeats more than a twentieth of them."""


class PretrainedSegmentationTrainer(PlannedNetworkTrainer):
    """nnU-Net's trainer from pretrained weights: warm-up, then the planned schedule.

    The weights are loaded when a training starts, not when it is resumed, validated or used for prediction. What
    pretraining did not train keeps the initialisation of this run, so folds differ in it as they do in nnU-Net.

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
        self.save_every = max(1, min(self.save_every, self.num_epochs // CHECKPOINTS_PER_RUN))
        self._log_settings()

    def initialize(self):
        if self.settings.seed is not None:
            random.seed(self.settings.seed)
            np.random.seed(self.settings.seed)
            torch.manual_seed(self.settings.seed)
        super().initialize()

    def configure_optimizers(self):
        optimizer, schedule = planned_optimisation(_bare(self.network), self.settings, epochs=self.num_epochs)
        self.initial_lr, self.weight_decay = schedule.lr, optimizer.defaults["weight_decay"]
        return optimizer, schedule

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if self.current_epoch == 0 and self.settings.weights is not None:
            self.load_pretrained_weights()
        super().on_train_start()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        rest_at_test_mode(_bare(self.network))
        groups = self.optimizer.param_groups
        if len(groups) > 1:
            rates = ", ".join(f"{group['name']} {np.round(group['lr'], 6)}" for group in groups)
            self.print_to_log_file(f"Learning rates: {rates}")

    def load_pretrained_weights(self) -> None:
        """Put the plan's weights into the network and log how much of it they cover.

        Raises:
            UserError: when the file is missing or unreadable, or covers less of the encoder than when it was written.
        """
        path = Path(self.preprocessed_dataset_folder_base, self.settings.weights)
        report = load_planned_weights(_bare(self.network), path, plans_name=self.plans_manager.plans_name)
        self.print_to_log_file(f"Loaded pretrained weights from {path}\n{report.table()}", add_timestamp=False)

    def _log_settings(self) -> None:
        changed = [
            f"{f.name}: {f.default} → {getattr(self.settings, f.name)}"
            for f in fields(self.settings)
            if getattr(self.settings, f.name) != f.default
        ]
        self.print_to_log_file(
            "Fine-tuning settings that differ from the default:\n" + ("\n".join(changed) or "none"), add_timestamp=False
        )


def _bare(network: nn.Module) -> nn.Module:
    network = network.module if isinstance(network, DistributedDataParallel) else network
    return network._orig_mod if isinstance(network, OptimizedModule) else network
