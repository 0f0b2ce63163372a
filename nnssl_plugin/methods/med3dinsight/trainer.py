"""``nnUNetv2_train ID 3d_fullres all -tr Med3DInsightPretrainer``."""

from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.methods.med3dinsight.objective import Med3DInsight
from nnssl_plugin.methods.med3dinsight.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.batches import TRAIN, embedding_size, matching_notes
from nnssl_plugin.pretraining.datasets import PlannedDataset
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

    def open_batches(self, dataset: PlannedDataset, cases: list[str], stream: tuple[int, ...]) -> StepBatches:
        batches = super().open_batches(dataset, cases, stream)
        if stream[1] == TRAIN:
            together = batches.batch_size * batches.ranks
            for note in matching_notes(batches, dataset.name, batch_size=together):
                self.print_to_log_file(note)
        return batches

    def build_task(self, backbone: Backbone) -> Med3DInsight:
        dim = embedding_size(self.plans_manager.dataset_name)
        return Med3DInsight(backbone, self.method_settings, dim, steps=self.total_steps)
