"""``nnUNetv2_train ID 3d_fullres all -tr Med3DInsightPretrainer``."""

from nnssl_plugin.methods.med3dinsight.objective import Med3DInsight
from nnssl_plugin.methods.med3dinsight.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.batches import embedding_size
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class Med3DInsightPretrainer(Pretrainer):
    """Pretrains the planned network with Med3DInsight; the dataset needs triplets (``nnssl_plugin caption -d ID``)."""

    method = "med3dinsight"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (
        "Chen, Q., Yao, X., Ye, H., Hong, Y.: Enhancing 3D Medical Image Understanding with Pretraining Aided by 2D "
        "Multimodal Large Language Models (Med3DInsight).",
    )

    def build_task(self, backbone: Backbone) -> Med3DInsight:
        return Med3DInsight(backbone, self.method_settings, embedding_size(self.plans_manager.dataset_name))
