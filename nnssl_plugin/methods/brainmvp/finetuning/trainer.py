"""BrainMVP's fine-tuning trainers: two copies of every image, in which templates stand for some of its modalities.

Validation and inference see images as they are.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl_plugin.checkpoints.format.provenance import describe_input
from nnssl_plugin.checkpoints.format.spatial_arrays import (
    SpatialArray,
    as_state,
    read_spatial_arrays,
    spatial_arrays_of,
)
from nnssl_plugin.data.cases import available_channels
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.settings import method_settings_of
from nnssl_plugin.methods.brainmvp.finetuning.augmentation import sparing_templates
from nnssl_plugin.methods.brainmvp.finetuning.cases import ChannelTemplates, TemplatedDataset, channel_templates
from nnssl_plugin.methods.brainmvp.finetuning.consistency import PairLoss
from nnssl_plugin.methods.brainmvp.finetuning.mixing import Mixing
from nnssl_plugin.methods.brainmvp.finetuning.settings import Settings
from nnssl_plugin.methods.brainmvp.trainer import TEMPLATES
from nnssl_plugin.nnunet.raw_folders import raw_folder
from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer
from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE
from nnssl_plugin.training.resumable import ResumableTrainer

CONSISTENCY = "consistency"
"""Series of nnU-Net's log: mean squared difference of the copies' deepest features, of the steps of an epoch."""
MIXING = 11
"""Stream of randomness beside those of batches and dropout."""


class _TemplatesTrainer(ResumableTrainer):
    """What both trainers add to theirs; stands before it among the bases."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = DEFAULT_DEVICE,
    ):
        self.mixing_settings: Settings = method_settings_of(plans, Settings())
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise UserError(
                f"{configuration} reads the segmentation of another configuration, for which there is no template.",
                "Train 3d_fullres, 3d_lowres or 2d.",
            )
        self.templates: SpatialArray | None = None
        self.mixing: Mixing | None = None

    # ------------------------------------------------------------------ what differs between the two

    def planned_weights(self) -> str | None:
        """File of the plan's weights, relative to the dataset's folder."""
        raise NotImplementedError

    def planned_seed(self) -> int | None:
        """Seed of the plan."""
        raise NotImplementedError

    def bare_network(self) -> torch.nn.Module:
        """The network of the plan."""
        raise NotImplementedError

    # ------------------------------------------------------------------ templates

    def with_templates(self, dataset) -> TemplatedDataset:
        """The training cases with their templates; from here on copies can be drawn."""
        if self.templates is None:
            self.templates = self._planned_templates()
        inside = self.configuration_manager.use_mask_for_norm
        templates = channel_templates(self.templates, self._channels(), self._input()["normalisation"], inside)
        folder = raw_folder(self.plans_manager.dataset_name)
        present = available_channels(folder, dataset.identifiers, len(templates.known))
        seed = self.planned_seed()
        entropy = int(np.random.SeedSequence().entropy) if seed is None else seed
        self.mixing = Mixing(
            self.mixing_settings,
            templates.known,
            present,
            dimensions=len(self.configuration_manager.patch_size),
            seed=(entropy, MIXING, self.local_rank),
        )
        self._say(templates)
        return TemplatedDataset(dataset, templates)

    def _planned_templates(self) -> SpatialArray:
        weights = self.planned_weights()
        if weights is None:
            raise UserError(
                f"{type(self).__name__} needs the templates of a BrainMVP pretraining, and plan "
                f"{self.plans_manager.plans_name} names no weights.",
                "nnssl_plugin adapt -d ID -w CHECKPOINT -n NAME; from scratch train without this trainer.",
            )
        path = Path(self.preprocessed_dataset_folder_base, weights)
        templates = read_spatial_arrays(path).get(TEMPLATES)
        if templates is None:
            raise UserError(
                f"{path} holds no templates: its weights are of another method.",
                "Adapt a checkpoint of BrainMVPPretrainer, or train with -tr "
                f"{type(self).__name__.replace('BrainMVP', 'Pretrained')}.",
            )
        names = self._channels()
        if all(templates.number_of(name) is None for name in names):
            raise UserError(
                f"{path} holds templates of {', '.join(templates.names)}; the dataset's channels are "
                f"{', '.join(names)}.",
                "Name the channels in dataset.json, raw and preprocessed, as the pretraining did.",
            )
        return templates

    def _input(self) -> dict[str, Any]:
        """Names and normalisation of the dataset's channels."""
        return describe_input(self.plans_manager.plans, self.configuration_name, self.dataset_json)

    def _channels(self) -> list[str]:
        return self._input()["channels"]

    def _say(self, templates: ChannelTemplates) -> None:
        names = self._channels()
        lacking = [name for name, known in zip(names, templates.known, strict=True) if not known]
        absent = sum(not present.all() for present in self.mixing.present.values())
        lines = [f"Templates of {self.templates.said()}", f"Mixing: {self.mixing_settings}"]
        lines += [f"NOTE: no template of {', '.join(lacking)}, never replaced."] if lacking else []
        lines += [f"{absent} of {len(self.mixing.present)} training cases lack a modality."] if absent else []
        self.print_to_log_file("\n".join(lines), add_timestamp=False)

    # ------------------------------------------------------------------ training

    def _build_loss(self):
        return PairLoss(super()._build_loss(), self.bare_network(), self.mixing_settings.consistency)

    @classmethod
    def get_training_transforms(cls, *args, **kwargs):
        """nnU-Net's augmentation, whose changes of intensity leave the templates alone."""
        return sparing_templates(super().get_training_transforms(*args, **kwargs))

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.loss.train()

    def on_train_epoch_end(self, train_outputs):
        super().on_train_epoch_end(train_outputs)
        self.log.add(CONSISTENCY, self.loss.mean_difference(), self.current_epoch)

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        self.loss.eval()

    # ------------------------------------------------------------------ checkpoints

    def own_state(self) -> dict[str, Any]:
        """The templates with it, so that a checkpoint is enough to fill in a missing modality."""
        return super().own_state() | as_state({} if self.templates is None else {TEMPLATES: self.templates})

    def load_own_state(self, checkpoint: dict[str, Any]) -> None:
        super().load_own_state(checkpoint)
        self.templates = spatial_arrays_of(checkpoint, Path(self.output_folder)).get(TEMPLATES)


class BrainMVPSegmentationTrainer(_TemplatesTrainer, PretrainedSegmentationTrainer):
    """Segmentation from BrainMVP's weights and templates, as the plan's ``finetuning`` block says.

    A step takes a batch twice, so it costs two of nnU-Net's, and the logged training loss is the sum of both.

    Raises:
        UserError: the plan does not fit, or names weights without templates of any of the dataset's channels.
    """

    def planned_weights(self) -> str | None:
        return self.settings.weights

    def planned_seed(self) -> int | None:
        return self.settings.seed

    def bare_network(self) -> torch.nn.Module:
        return self.saved_network()

    def get_tr_and_val_datasets(self):
        train, validation = super().get_tr_and_val_datasets()
        return self.with_templates(train), validation

    def train_step(self, batch: dict) -> dict:
        data = batch["data"].to(self.device, non_blocking=True)
        return super().train_step(batch | {"data": self.mixing.copies(data, batch["keys"], self.step)})


class BrainMVPClassificationTrainer(_TemplatesTrainer, PretrainedClassificationTrainer):
    """Classification from BrainMVP's weights and templates, on the same data and evaluation as without them.

    A step takes a batch twice, so it costs two, and the logged training loss is the sum of both.

    Raises:
        UserError: the plan does not fit, or names weights without templates of any of the dataset's channels.
    """

    def planned_weights(self) -> str | None:
        return self.finetuning.weights

    def planned_seed(self) -> int | None:
        return self.seed

    def bare_network(self) -> torch.nn.Module:
        return self.network.backbone.network

    def training_dataset(self, dataset):
        return self.with_templates(dataset)

    def train_step(self, batch: dict) -> dict:
        data = batch["data"].to(self.device, non_blocking=True).transpose(1, 2)  # windows behind the channels
        copies = self.mixing.copies(data, batch["case"], self.step).transpose(1, 2)
        return super().train_step(batch | {"data": copies})
