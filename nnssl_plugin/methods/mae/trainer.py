"""``nnUNetv2_train ID 3d_fullres all -tr MAEPretrainer``."""

from nnssl_plugin.methods.mae.objective import MAE
from nnssl_plugin.methods.mae.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class MAEPretrainer(Pretrainer):
    """Pretrains the planned network, encoder and decoder, by masked autoencoding."""

    method = "mae"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (
        "He, K., Chen, X., Xie, S., Li, Y., Dollár, P., Girshick, R.: Masked Autoencoders Are Scalable Vision Learners "
        "(MAE). CVPR 2022.",
    )

    def build_task(self, backbone: Backbone) -> MAE:
        return MAE(backbone, self.method_settings)
