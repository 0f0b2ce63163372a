"""The nnU-Net trainer under every pretraining method: it owns everything but the method itself.

While training, ``self.network`` is the method's :class:`PretextTask`; checkpoints hold the bare network of the plan.
Batch, views and dropout of step k depend on (seed, rank, k) alone, and all state counts steps, so that a run can stop
anywhere and go on with the same weights, bit for bit on a CPU.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from os.path import join
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, autocast, nn

from nnssl_plugin.checkpoints.format.spatial_arrays import ENTRY, SpatialArray, declared
from nnssl_plugin.data.batch import Batch
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.streams import BatchStream, prepare_workers
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.fast_blocks import has_fast_blocks, reason_against_fast_blocks, use_fast_blocks
from nnssl_plugin.networks.recomputing import recompute_activations
from nnssl_plugin.nnunet.planes import axis_letters
from nnssl_plugin.pretraining.batch_norm import RunningStatistics, check_batch_norm
from nnssl_plugin.pretraining.batches import PURPOSES, TRAIN, VALIDATE, batches_of, open_batches
from nnssl_plugin.pretraining.datasets import PlannedDataset, check_sources, datasets_of, splits_of
from nnssl_plugin.pretraining.initial_weights import start_from, take_weights_entry
from nnssl_plugin.pretraining.optimisation import optimisation_of
from nnssl_plugin.pretraining.passes import backward, first_chunk, forward
from nnssl_plugin.pretraining.pretext import PretextTask, Terms
from nnssl_plugin.pretraining.probing import LabelProbe, probe_of
from nnssl_plugin.pretraining.provenance import describe_run, describe_weights
from nnssl_plugin.pretraining.settings import TrainingSettings, changed_settings, read_settings
from nnssl_plugin.pretraining.skipped_steps import FILE as SKIPPED
from nnssl_plugin.pretraining.skipped_steps import stop_if_broken, tell_of_skipped
from nnssl_plugin.pretraining.update import update
from nnssl_plugin.pretraining.validation import ValidationNumbers
from nnssl_plugin.training.distributed import gather_samples
from nnssl_plugin.training.epoch_sums import EpochSums
from nnssl_plugin.training.figures import draw_progress
from nnssl_plugin.training.loading import streams_of
from nnssl_plugin.training.pictures import draw_pictures
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE
from nnssl_plugin.training.resumable import FINAL, ResumableTrainer
from nnssl_plugin.training.user_errors import end_in_words

BARE = "backbone.network."
"""Prefix of the bare network's keys in the task's state."""


class Pretrainer(ResumableTrainer):
    """Base of the pretraining trainers; a method gives its settings, its citation, and :meth:`build_task`.

    Settings come from the plan's ``pretraining`` block: the fields of ``TrainingSettings``, and ``method`` with the
    fields of the method's own settings.
    """

    method: str
    training_defaults = TrainingSettings()
    method_defaults: Any
    citations: tuple[str, ...] = ()
    seconds_between_checkpoints = 0.0
    continued_arrays: tuple[str, ...] = ()
    """Names of the spatial arrays that :meth:`take_arrays` takes up from initial weights."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = DEFAULT_DEVICE,
    ):
        self.training_settings, self.method_settings = read_settings(
            plans, self.method, self.training_defaults, self.method_defaults
        )
        self.initial_weights = take_weights_entry(dict(plans.get("pretraining", {})))
        self.continued_from: dict[str, Any] | None = None
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.training_settings.epochs
        self.num_iterations_per_epoch = self.training_settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.training_settings.validation_iterations * max(
            1, len(self.training_settings.sources)
        )
        self.initial_lr = self.training_settings.lr
        self.weight_decay = self.training_settings.weight_decay
        self.enable_deep_supervision = False
        self.inference_allowed_mirroring_axes = None
        self.task: PretextTask
        self.datasets: list[PlannedDataset]
        self.generator = torch.Generator(self.device)
        self.sums = EpochSums(self.device)
        self.validation: ValidationNumbers
        self.label_probe: LabelProbe | None = None

    def build_task(self, backbone: Backbone) -> PretextTask:
        """The method around the planned network; ``self.method_settings`` holds its settings."""
        raise TypeError(f"{type(self).__name__} must define build_task()")

    def network_channels(self, channels: int) -> int:
        """Input channels of the network on a dataset of ``channels``; where they differ, the method's ``views`` make
        images of that many out of the batch's."""
        return channels

    def window_size(self, dataset: PlannedDataset) -> tuple[int, ...]:
        """Size of a dataset's windows in voxels, before the margin that the method needs."""
        return tuple(dataset.planned.patch_size)

    def spatial_arrays(self) -> dict[str, SpatialArray]:
        """Volumes that the task learned and that checkpoints carry to other grids, by their names; usually none."""
        return {}

    def take_arrays(self, arrays: Mapping[str, SpatialArray]) -> None:
        """Go on from arrays of :attr:`continued_arrays` that the initial weights hold, on the grid of this plan."""

    # ------------------------------------------------------------------ building

    def initialize(self) -> None:
        """Build network and task from the seed; wrap them for this device where there are several ranks."""
        torch.manual_seed(self.training_settings.seed)
        self.datasets = datasets_of(self)
        super().initialize()
        self.running_statistics = RunningStatistics(self.task)
        check_sources(self)
        if self.is_ddp:
            self.task.gather = gather_samples
        self._log_settings()

    def build_network_architecture(  # type: ignore[override]  # nnU-Net's training calls it on the trainer
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        *others,
        **options,
    ) -> nn.Module:
        """The planned network, with the method's number of input channels in place of the dataset's.

        Raises:
            UserError: where nnU-Net's prediction calls it on the class, the plan in the trainer's place.
        """
        if not isinstance(self, Pretrainer):
            end_in_words()
            raise UserError(
                "These are pretrained weights: they have learned to describe images, not to segment them.",
                "Fine-tune them first, then predict with the fine-tuned ones: nnssl_plugin adapt -d TARGET_ID -w "
                "CHECKPOINT -n NAME",
            )
        channels = self.network_channels(num_input_channels)
        network = super().build_network_architecture(plans_manager, configuration_manager, channels, *others, **options)
        if self._takes_fast_blocks(network):
            use_fast_blocks(network)
        if self.training_settings.recompute:
            recompute_activations(network)
        return network

    def _takes_fast_blocks(self, network: nn.Module) -> bool:
        chosen = self.training_settings.fast
        return self.device.type == "cuda" and not reason_against_fast_blocks(network) if chosen is None else chosen

    def configure_optimizers(self):
        """Put the task in the network's place, the one moment between building and wrapping."""
        backbone = Backbone(self.network, self.network_channels(self.num_input_channels))
        self.task = self.network = self.build_task(backbone).to(self.device)
        check_batch_norm(self.task, self.training_settings, device=self.device, several_ranks=self.is_ddp)
        if super()._do_i_compile():
            for module in self.network.modules():  # a teacher's backbone too
                if isinstance(module, Backbone) and not has_fast_blocks(module):
                    module.compile_parts()
        return optimisation_of(self.task, self.training_settings, total=self.total_steps)

    @property
    def synchronises_batch_norm(self) -> bool:
        return self.training_settings.batch_norm == "synchronised"

    def _do_i_compile(self) -> bool:
        """The task is not compiled as a whole; ``configure_optimizers`` compiles the backbone in place."""
        return False

    def _build_loss(self) -> None:
        """The task holds the losses."""

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The network is built without it: pretraining reads the decoder before its segmentation layers."""

    def plot_network_architecture(self) -> None:
        """nnU-Net's plot feeds one image, which a task does not take."""

    def _set_batch_size_and_oversample(self) -> None:
        """The batch size counts samples per rank (nnU-Net's plan counts them over all ranks)."""
        self.batch_size = max(dataset.batch_size for dataset in self.datasets)

    def get_dataloaders(self) -> tuple[BatchStream, BatchStream]:
        """Training batches from the present step on, and the same few validation batches for every epoch."""
        splits = splits_of(self)
        self.cases_of_datasets = [len(training) for training, _ in splits]
        self.training_cases = sum(self.cases_of_datasets)
        of_purpose = (batches_of(self, [split[purpose] for split in splits], purpose) for purpose in PURPOSES)
        return streams_of(self, *of_purpose)

    def open_batches(self, dataset: PlannedDataset, cases: list[str], stream: tuple[int, ...]) -> StepBatches:
        """Batches of one dataset; ``stream`` begins with seed and purpose."""
        return open_batches(
            dataset,
            cases,
            self.task.needs,
            patch_size=self.window_size(dataset),
            stream=stream,
            whose=type(self).__name__,
            rank=self.local_rank,
            labels=stream[1] == VALIDATE,
        )

    # ------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        prepare_workers(get_allowed_n_proc_DA())
        super().on_train_start()
        self.label_probe = probe_of(self)
        if self.step == 0 and self.local_rank == 0:
            Path(self.output_folder, SKIPPED).unlink(missing_ok=True)  # of an earlier run
        if self.step == 0 and self.initial_weights is not None:
            self.continued_from = start_from(self, self.initial_weights)

    def on_train_epoch_start(self) -> None:
        self.network.train()
        self.print_to_log_file(f"\nEpoch {self.current_epoch} of {self.num_epochs}")
        self._epoch_started, self.dataloader_train.waited = time.perf_counter(), 0.0

    def train_step(self, batch: Batch) -> dict:
        """One step: views, forward, backward, update. The pretrainer itself never waits for the device here."""
        progress = self.step / self.total_steps
        self.lr_scheduler.step(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.running_statistics.remember()
        views = self._views(batch, TRAIN, self.step)
        terms = self._backward(views, progress)
        applied = self._update(terms["total"])
        self.running_statistics.settle(applied)
        self.task.after_step(progress, applied)
        self.sums.add(terms, applied, batch["kind"] if self._several_kinds else "")
        self.end_step()
        return {}

    @property
    def _several_kinds(self) -> bool:
        return len({dataset.kind for dataset in self.datasets}) > 1

    def _views(self, batch: Batch, purpose: int, step: int) -> dict[str, Tensor]:
        """Views of a batch; seeds everything that draws numbers in this step, dropout included."""
        seed, dropout_seed = self.seeds(purpose, step)
        torch.manual_seed(dropout_seed)
        self.generator.manual_seed(seed)
        moved = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            return self.task.views(moved, self.generator)

    def seeds(self, purpose: int, step: int) -> tuple[int, int]:
        """Seeds of the views and of dropout."""
        entropy = [self.training_settings.seed, purpose, self.local_rank, step]
        seed, dropout_seed = np.random.SeedSequence(entropy).generate_state(2, np.uint64) >> np.uint64(1)
        return int(seed), int(dropout_seed)

    def _backward(self, views: dict[str, Tensor], progress: float) -> Terms:
        """Forward and backward of the batch; the terms of the loss."""
        return backward(self, views, progress)

    def precision(self):
        """nnU-Net's rule: mixed precision on CUDA only."""
        return autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _update(self, total: Tensor) -> Tensor:
        """Clipping and the optimiser's step; () bool on the device: False if a value was not finite."""
        return update(self.optimizer, total, scaler=self.grad_scaler, clip=self.training_settings.gradient_clip)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        seconds = time.perf_counter() - self._epoch_started
        means = self.sums.means()
        self._log_value("train_losses", means.pop("total", float("nan")))
        self._log_value("lrs", self.optimizer.param_groups[0]["lr"])
        for name, value in means.items():
            self._log_value(f"train/{name}", value)
        self._log_value("skipped_steps", float(self.sums.skipped))
        self._log_value("seconds_waiting", self.dataloader_train.waited)
        self._log_value("seconds_computing", seconds - self.dataloader_train.waited)
        if self.local_rank == 0:
            tell_of_skipped(self)
        stop_if_broken(self)
        self.sums.reset()

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        self.network.eval()
        self.validation = ValidationNumbers(self.device, several=self._several_kinds)

    def validation_step(self, batch: Batch) -> dict:
        """Loss terms and diagnostics of one of the fixed validation batches."""
        views = self._views(batch, VALIDATE, self.validation.batches)
        terms = forward(self, views, self.step / self.total_steps)
        with self.precision():
            diagnostics = self.task.diagnostics(first_chunk(views, self.training_settings.chunk_size))
        first_of_kind = self.validation.add(batch["kind"], terms, diagnostics)
        if first_of_kind and self._due(self.training_settings.figure_every):
            self._draw(views, batch["kind"])
        return {}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        for warning in self.validation.log_to(self.log, self.current_epoch):
            self.print_to_log_file(warning)
        if self.label_probe is not None and self._due(self.training_settings.probe_every):
            self._probe(self.label_probe)

    def _due(self, every: int) -> bool:
        """Whether this epoch is one of those with a picture or a probe; the last one always is."""
        done = self.current_epoch + 1
        return self.local_rank == 0 and (done % every == 0 or done == self.num_epochs)

    def _probe(self, probe: LabelProbe) -> None:
        found, seconds = probe.measure(self.task.backbone, str(self.device))
        for name, value in found.items():
            self._log_value(name, value)
        self.print_to_log_file(f"Probe of {len(probe.scored)} cases: {seconds:.1f} s")

    def _draw(self, views: dict[str, Tensor], kind: str) -> None:
        dataset = next(each for each in self.datasets if each.kind == kind)
        letters, of_kind = axis_letters(dataset.plans), f"_{kind}" if self._several_kinds else ""
        unified = self.task.needs.unifies  # then a view's voxels are the method's own
        spacing = [1.0] * self.task.backbone.dimensions if unified else dataset.planned.spacing
        for name, images in self.task.pictures(views).items():
            path = join(self.output_folder, "figures", f"{name}{of_kind}_epoch_{self.current_epoch:04d}.png")
            draw_pictures(images, path, spacing, letters)

    # ------------------------------------------------------------------ ends

    def on_epoch_end(self) -> None:
        self._log_value("epoch_end_timestamps", time.time())
        self._log_value("peak_memory_gib", self.log.peak_memory(self.device))
        self.print_to_log_file(self.log.summary(self.current_epoch, self.num_epochs))
        self.current_epoch += 1
        if self.pictures_are_due():
            draw_progress(self.log.history(), join(self.output_folder, "progress.png"))
        self.end_epoch()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """There are no labels to validate on: write the last epoch's numbers and say what comes next."""
        if self.local_rank == 0:
            write_json(join(self.output_folder, "quality.json"), self.log.last())
            checkpoint = join(self.output_folder, FINAL)
            self.print_to_log_file(f"Pretrained weights: {checkpoint}")
            self.print_to_log_file(f"Next: nnssl_plugin adapt -d TARGET_ID -w {checkpoint} -n {self.method}")

    # ------------------------------------------------------------------ checkpoints

    def saved_network(self) -> nn.Module:
        """The bare network of the plan."""
        return self.task.backbone.network

    def own_state(self) -> dict[str, Any]:
        """The task's state beside the network, and what describes the weights (see docs/reference)."""
        arrays = self.spatial_arrays()
        return {
            "ssl_state": {
                "task": self._task_state(),
                "step": self.step,
                "epoch_sums": self.sums.state(),
                **({ENTRY: declared(arrays)} if arrays else {}),
            },
            "provenance": self.provenance(),
            **describe_weights(self),
        }

    def check_is_resumable(self, checkpoint: dict[str, Any]) -> None:
        if not {"ssl_state", "optimizer_state"} <= checkpoint.keys():
            raise UserError(
                "The checkpoint holds no pretraining to continue (ssl_state and optimizer_state; a shared "
                "folder leaves the optimiser out).",
                "Start without --c.",
            )

    def load_own_state(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ssl_state"]
        network = {BARE + key: value for key, value in checkpoint["network_weights"].items()}
        self.load_weights(self.task, state["task"] | network)
        self.step = state["step"]
        self.sums.load(state["epoch_sums"])
        self.continued_from = checkpoint.get("provenance", {}).get("continued_from")

    def _task_state(self) -> dict[str, Tensor]:
        """What the task holds beyond the bare network."""
        return {key: value for key, value in self.task.state_dict().items() if not key.startswith(BARE)}

    def provenance(self) -> dict[str, Any]:
        """What the checkpoint says of the run that wrote it."""
        return describe_run(self)

    # ------------------------------------------------------------------ logging

    def _log_value(self, name: str, value: float) -> None:
        self.log.add(name, float(value), self.current_epoch)

    def _log_settings(self) -> None:
        """Print every setting that differs from the method's default, old → new."""
        changed = changed_settings(self.training_settings, self.training_defaults)
        changed += changed_settings(self.method_settings, self.method_defaults)
        for line in changed:
            self.print_to_log_file(f"Setting {line} (plan)")
        planned = self.configuration_manager.batch_size
        if not self.training_settings.sources and self.batch_size != planned:
            self.print_to_log_file(f"Batch size: {planned} (planned) → {self.batch_size} per rank (pretraining block)")
