"""``nnUNetv2_train ID 3d_fullres all -tr DistillationPretrainer -p PLAN``, where the plan names the teacher."""

from pathlib import Path
from typing import Any

from nnssl_plugin.checkpoints.adaptation.inputs import compare_inputs
from nnssl_plugin.checkpoints.format.provenance import describe_input, weights_hash
from nnssl_plugin.checkpoints.sources.source import Source
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.distillation.normalisation import rules_for
from nnssl_plugin.methods.distillation.objective import Distillation
from nnssl_plugin.methods.distillation.settings import TRAINING, Settings
from nnssl_plugin.methods.distillation.teacher import check_fits, read_teacher
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.initial_weights import origin_of
from nnssl_plugin.pretraining.pretrainer import Pretrainer


class DistillationPretrainer(Pretrainer):
    """Pretrains the encoder of the planned network to give the maps of a frozen teacher."""

    method = "distillation"
    training_defaults = TRAINING
    method_defaults = Settings()
    citations = (
        "Romero, A., Ballas, N., Kahou, S.E., Chassang, A., Gatta, C., Bengio, Y.: FitNets: Hints for Thin Deep Nets "
        "(Distillation of maps). ICLR 2015.",
    )

    def build_task(self, backbone: Backbone) -> Distillation:
        """Read the teacher, and say what it is."""
        if self.method_settings.teacher is None:
            raise UserError(
                f"Plan {self.plans_manager.plans_name} names no teacher.",
                "nnssl_plugin plan -d ID -p PLANS -n NAME --preset distillation --set method.teacher=FILE",
            )
        teacher = read_teacher(Path(self.preprocessed_dataset_folder_base, self.method_settings.teacher))
        check_fits(teacher, tuple(self.configuration_manager.patch_size), self.num_input_channels)
        self.teacher = origin_of(teacher.source, weights_hash(teacher.source.weights))
        plan = (self.plans_manager.plans, self.configuration_name)
        rules = rules_for(teacher.source, self.method_settings.normalisation, *plan, self.num_input_channels)
        task = Distillation(backbone, self.method_settings, teacher=teacher.backbone.to(self.device), rules=rules)
        self._describe(task, compare_inputs(_unlike(teacher.source), describe_input(*plan, self.dataset_json)))
        return task

    def load_own_state(self, checkpoint: dict[str, Any]) -> None:
        """The state of the run, which must have had the same teacher."""
        before = (checkpoint.get("provenance", {}).get("teacher") or {}).get("weights_sha256")
        if before != self.teacher["weights_sha256"]:
            raise UserError(
                f"The run learned from other weights ({before}) than those of the teacher "
                f"{self.method_settings.teacher} ({self.teacher['weights_sha256']}).",
                "Put the first teacher back, or start without --c.",
            )
        super().load_own_state(checkpoint)

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"teacher": self.teacher}

    def _describe(self, task: Distillation, differences: list[str]) -> None:
        teacher = task.teacher
        stride, own = teacher.strides[task.teacher_stage], task.backbone.strides[task.stage]
        self.print_to_log_file(
            f"Teacher: {self.teacher['checkpoint']} ({self.teacher.get('method', self.teacher['kind'])}), its map of "
            f"{teacher.channels[task.teacher_stage]} channels at stride {list(stride)}; the student's has "
            f"{task.backbone.channels[task.stage]} at {list(own)}. Licence: {self.teacher.get('licence', 'not stated')}"
        )
        for line in differences:
            self.print_to_log_file(f"NOTE: {line}")


def _unlike(source: Source) -> dict[str, Any]:
    """What the file says of its images that the rules do not make up for."""
    return {field: value for field, value in source.provenance.items() if field != "normalisation"}
