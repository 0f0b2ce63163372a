"""For ``weight_routes.py``: nnU-Net's trainer with the seed and the steps of the plan's ``finetuning`` block.

Nothing else differs, so from the same weights its losses must be those of ``PretrainedSegmentationTrainer``.
"""

import random

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_plugin.finetuning.settings import read_settings
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE


class SeededStockTrainer(nnUNetTrainer):
    """nnU-Net's trainer, seeded before the network is built."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = DEFAULT_DEVICE,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings = read_settings(plans, configuration)
        self.seed = settings.seed
        self.num_epochs = settings.epochs
        self.num_iterations_per_epoch = settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = settings.validation_iterations

    def initialize(self):
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        super().initialize()
