"""``nnUNetv2_train ID 3d_fullres all -tr BrainMVPPretrainer``."""

from collections import Counter
from collections.abc import Mapping

import torch

from nnssl_plugin.checkpoints.format.provenance import describe_input
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray
from nnssl_plugin.data.cases import largest_shape
from nnssl_plugin.methods.brainmvp.objective import BrainMVP
from nnssl_plugin.methods.brainmvp.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.planes import grid_axes
from nnssl_plugin.pretraining.pretrainer import Pretrainer
from nnssl_plugin.transforms.placement import on_case

TEMPLATES = "templates"
"""Name of the spatial array that checkpoints declare."""


class BrainMVPPretrainer(Pretrainer):
    """Pretrains the planned network, encoder and decoder, and a template of each channel, one channel at a time."""

    method = "brainmvp"
    training_defaults = TRAINING
    method_defaults = Settings()
    continued_arrays = (TEMPLATES,)
    citations = (
        "Rui, S., Chen, L., Tang, Z., Wang, L., Liu, M., Zhang, S., Wang, X.: Multi-modal Vision Pre-training for "
        "Medical Image Analysis (BrainMVP). arXiv:2410.10604.",
    )

    def network_channels(self, channels: int) -> int:
        """One, whatever the dataset has: cases may lack any of them."""
        return 1

    def build_task(self, backbone: Backbone) -> BrainMVP:
        return BrainMVP(
            backbone,
            self.method_settings,
            modalities=self._modalities(),
            template_size=self.method_settings.template_size or largest_shape(self.preprocessed_dataset_folder),
            lr=self.training_settings.lr,
        )

    def spatial_arrays(self) -> dict[str, SpatialArray]:
        """The templates, as the network sees them."""
        seen = self._input()
        schemes = seen["normalisation"]
        return {
            TEMPLATES: SpatialArray(
                values=self.task.shown_templates().detach(),
                names=self.task.modalities,
                spacing_mm=tuple(seen["spacing_mm"]),
                axes=grid_axes(self.plans_manager.plans),
                normalisation=tuple(schemes if len(schemes) > 1 else schemes * len(self.task.modalities)),
            )
        }

    @torch.no_grad()
    def take_arrays(self, arrays: Mapping[str, SpatialArray]) -> None:
        """Templates go on where a modality of this name was learned before, centre on centre; the others start at 0."""
        learned = arrays.get(TEMPLATES)
        if learned is None:
            return
        for template, name in zip(self.task.templates, self.task.modalities, strict=True):
            number = learned.number_of(name)
            if number is not None:
                template.copy_(on_case(learned.values[number], template.shape))

    def get_dataloaders(self):
        loaders = super().get_dataloaders()
        self.print_to_log_file(cost_of_templates(self.task.templates.shape))
        for note in self._notes(loaders[0].batches.available.values()):
            self.print_to_log_file(note)
        return loaders

    def _notes(self, available) -> list[str]:
        """What the cases do not allow."""
        having = sum(available)
        absent = [name for name, number in zip(self.task.modalities, having, strict=True) if not number]
        single = sum(case.sum() == 1 for case in available)
        notes = []
        if absent:
            notes.append(f"NOTE: no training case has {', '.join(absent)}: their templates stay 0.")
        if single:
            notes.append(f"NOTE: {single} of {len(available)} cases have one channel: they learn from templates alone.")
        if self.batch_size == 1 and not self.is_ddp:
            notes.append("NOTE: the contrast compares the cases of a step and says nothing at a batch size of 1.")
        return notes

    def _modalities(self) -> list[str]:
        """Names of the dataset's channels; a name that several have gets the channel's number."""
        names = self._input()["channels"]
        number = Counter(names)
        return [name if number[name] == 1 else f"{name}_{channel}" for channel, name in enumerate(names)]

    def _input(self) -> dict:
        return describe_input(self.plans_manager.plans, self.configuration_name, self.dataset_json)


def cost_of_templates(shape) -> str:
    """What templates of a shape (S, *grid) cost, for the log: memory with gradient and AdamW's state, and its step."""
    values = shape.numel()
    return (
        f"Templates: {' x '.join(map(str, shape))} voxels, {values * 4 / 2**20:,.0f} MiB, with gradient and AdamW's "
        f"state {values * 16 / 2**20:,.0f} MiB. AdamW moves {values * 28 / 2**20:,.0f} MiB of memory for them at every "
        "step. Smaller: nnssl_plugin plan -d ID -n NAME --set 'method.template_size=[D,H,W]'"
    )
