"""nnU-Net's trainer for every network that a plan can name: with deep supervision (U-Nets), or without (all others)."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnssl_plugin.nnunet.plans import takes_deep_supervision

DEFAULT_DEVICE = torch.device("cuda")
"""nnU-Net's."""


class PlannedNetworkTrainer(nnUNetTrainer):
    """Deep supervision where the planned network has it; for all else nnU-Net's trainer.

    nnU-Net's own Primus trainers do the same for the networks that they hard-code.
    """

    def initialize(self):
        self.enable_deep_supervision &= takes_deep_supervision(self.configuration_manager.network_arch_class_name)
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network_class = configuration_manager.network_arch_class_name
        return get_network_from_plans(
            network_class,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision if takes_deep_supervision(network_class) else None,
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        if takes_deep_supervision(self.configuration_manager.network_arch_class_name):
            super().set_deep_supervision_enabled(enabled)
