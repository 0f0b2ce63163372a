"""``nnUNetv2_train ID 2d all -tr LVMMedPretrainer``."""

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.lvm_med.objective import LVMMed
from nnssl_plugin.methods.lvm_med.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class LVMMedPretrainer(Pretrainer):
    """Pretrains the encoder of the planned 2D network with LVM-Med."""

    method = "lvm-med"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (
        "Nguyen, D.M.H., Nguyen, H., Diep, N.T., Pham, T.N., Cao, T., Nguyen, B.T., Swoboda, P., Ho, N., Albarqouni, "
        "S., Xie, P., Sonntag, D., Niepert, M.: LVM-Med: Learning Large-Scale Self-Supervised Vision Models for "
        "Medical Imaging via Second-order Graph Matching. NeurIPS 2023.",
    )

    def network_channels(self, channels: int) -> int:
        return self.method_settings.channels or channels

    def build_task(self, backbone: Backbone) -> LVMMed:
        planned = self.configuration_manager
        return LVMMed(backbone, self.method_settings, size=planned.patch_size, spacing=planned.spacing)

    def get_dataloaders(self):
        for dataset in self.datasets:
            self._check_graphs(dataset.batch_size)
        return super().get_dataloaders()

    def _check_graphs(self, rows: int) -> None:
        """Refuse a batch that makes no graph; say where some of its images are in none."""
        nodes = self.method_settings.nodes
        if rows < 2:
            raise UserError(
                f"A batch of {rows} image makes no graph: LVM-Med tells the images of a batch apart.",
                f"nnssl_plugin plan -d ID -p PLANS -n NAME --set batch_size={nodes}",
            )
        over = rows % nodes if rows > nodes else 0
        if over:
            self.print_to_log_file(
                f"NOTE: {over} of the {rows} images of a batch belong to no graph of {nodes} and are not learned from. "
                f"To use all: nnssl_plugin plan -d ID -n NAME --set batch_size={rows - over}"
            )
