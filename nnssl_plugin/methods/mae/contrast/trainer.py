"""``nnUNetv2_train ID 3d_fullres all -tr MAEContrastPretrainer``."""

from nnssl_plugin.methods.mae.contrast.objective import MAEContrast
from nnssl_plugin.methods.mae.contrast.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class MAEContrastPretrainer(Pretrainer):
    """Pretrains the planned network, encoder and decoder, by masked autoencoding of two crops that must agree."""

    method = "mae-contrast"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (
        "Vaish, P., Meister, F., Heimann, T., Brune, C., Wolterink, J.M.: Consistent View Alignment Improves "
        "Foundation Models for 3D Medical Image Segmentation (the idea of MAE with aligned contrast). "
        "arXiv:2509.13846, 2025.",
        "He, K., Chen, X., Xie, S., Li, Y., Dollár, P., Girshick, R.: Masked Autoencoders Are Scalable Vision Learners "
        "(MAE). CVPR 2022.",
    )

    def build_task(self, backbone: Backbone) -> MAEContrast:
        return MAEContrast(backbone, self.method_settings, patch_size=self.configuration_manager.patch_size)
