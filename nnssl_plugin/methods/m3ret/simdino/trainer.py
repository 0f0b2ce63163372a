"""``nnUNetv2_train ID 3d_fullres all -tr M3RetSimDINOPretrainer``."""

from nnssl_plugin.methods.m3ret import CITATION
from nnssl_plugin.methods.m3ret.inputs import image_channels
from nnssl_plugin.methods.m3ret.simdino.objective import SimDINO
from nnssl_plugin.methods.m3ret.simdino.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class M3RetSimDINOPretrainer(Pretrainer):
    """Pretrains the encoder of the planned network by SimDINO, as M3Ret does."""

    method = "m3ret-simdino"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (CITATION.format(objective="M3Ret, SimDINO"),)

    def build_task(self, backbone: Backbone) -> SimDINO:
        return SimDINO(backbone, self.method_settings, channels=self._image_channels())

    def network_channels(self, channels: int) -> int:
        return self._image_channels() or channels

    def _image_channels(self) -> int | None:
        return image_channels(self.method_settings, several=bool(self.training_settings.sources))
