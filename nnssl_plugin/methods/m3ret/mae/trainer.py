"""``nnUNetv2_train ID 3d_fullres all -tr M3RetMAEPretrainer``."""

from nnssl_plugin.methods.m3ret import CITATION
from nnssl_plugin.methods.m3ret.inputs import image_channels
from nnssl_plugin.methods.m3ret.mae.objective import M3RetMAE
from nnssl_plugin.methods.m3ret.mae.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class M3RetMAEPretrainer(Pretrainer):
    """Pretrains the encoder of a planned transformer by M3Ret's masked autoencoding."""

    method = "m3ret-mae"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (CITATION.format(objective="M3Ret, MAE"),)

    def build_task(self, backbone: Backbone) -> M3RetMAE:
        return M3RetMAE(backbone, self.method_settings, channels=self._image_channels())

    def network_channels(self, channels: int) -> int:
        return self._image_channels() or channels

    def _image_channels(self) -> int | None:
        return image_channels(self.method_settings, several=bool(self.training_settings.sources))
