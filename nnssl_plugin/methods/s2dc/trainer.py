"""``nnUNetv2_train ID 3d_fullres all -tr S2DCPretrainer``."""

from nnssl_plugin.methods.s2dc.objective import S2DC
from nnssl_plugin.methods.s2dc.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class S2DCPretrainer(Pretrainer):
    """Pretrains the encoder of the planned network with S2DC."""

    method = "s2dc"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (
        "Pan, T., Tan, Z., Guo, K., Xu, D., Xu, W., Jiang, C., Guo, X., Qi, Y., Cheng, Y.: Structure-aware Semantic "
        "Discrepancy and Consistency for 3D Medical Image Self-supervised Learning (S2DC). ICCV 2025.",
    )

    def build_task(self, backbone: Backbone) -> S2DC:
        return S2DC(backbone, self.method_settings, spacing=self.configuration_manager.spacing)

    def get_dataloaders(self):
        loaders = super().get_dataloaders()
        if self.method_settings.queue > self.training_cases:
            self.print_to_log_file(
                f"NOTE: the queue holds {self.method_settings.queue} features and there are {self.training_cases} "
                "training cases, so a case meets itself among its negatives. Fewer: nnssl_plugin plan -d ID -n NAME "
                f"--set method.queue={max(1, self.training_cases // 2)}"
            )
        return loaders
