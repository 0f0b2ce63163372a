"""Image classification on nnU-Net's plans, folds and folders, from pretrained weights or from scratch.

Batch, augmentation and dropout of step k depend on (seed, k) alone, and the state counts steps: a run can stop anywhere
and go on with the same weights, bit for bit on a CPU.
"""

import time
from dataclasses import asdict, fields, replace
from functools import partial
from os.path import join
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from nnssl_plugin.data.streams import BatchStream, prepare_workers
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import rest_at_test_mode
from nnssl_plugin.finetuning.weights import load_planned_weights, planned_optimisation
from nnssl_plugin.networks.fast_blocks import use_fast_blocks
from nnssl_plugin.networks.recomputing import recompute_activations
from nnssl_plugin.nnunet.case_labels import targets_block
from nnssl_plugin.tasks.classification.batches import (
    WINDOWS,
    ClassCases,
    TrainingBatches,
    ValidationBatches,
    case_inputs,
    repeatable,
    sampling_weights,
)
from nnssl_plugin.tasks.classification.checkpoints import BEST, FILES, FINAL, VALIDATION
from nnssl_plugin.tasks.classification.classifier import Classifier
from nnssl_plugin.tasks.classification.labelled_cases import cases_of_fold, frequencies, loss_weights, read_labels
from nnssl_plugin.tasks.classification.losses import joint_loss, joint_probabilities
from nnssl_plugin.tasks.classification.settings import (
    BLOCK,
    EPOCHS,
    OPTIMISER,
    SEED,
    chosen_targets,
    read_classification,
    read_finetuning,
)
from nnssl_plugin.tasks.classification.validation import ClassValidation
from nnssl_plugin.training.figures import Panel, draw_progress
from nnssl_plugin.training.loading import streams_of
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE
from nnssl_plugin.training.resumable import ResumableTrainer

DROPOUT = 2
"""Stream of randomness beside those of the batches."""
PANELS: tuple[Panel, ...] = (
    ("Loss (solid: training, dashed: validation)", lambda k: k in ("train_losses", "val_losses")),
    ("Validation AUROC (mean over classes)", lambda k: k.startswith("auroc")),
    ("Learning rate of the head", lambda k: k == "lrs"),
    ("Validation balanced accuracy", lambda k: k.startswith("balanced_accuracy")),
)


class PretrainedClassificationTrainer(ResumableTrainer):
    """The encoder of the plan's network with a head on its pooled stages.

    Settings come from the plan's blocks ``classification`` (what is seen and learned) and ``finetuning`` (weights, and
    what moves when); without the second, training starts from scratch. The validation cases are predicted by the
    final checkpoint; ``checkpoint_best.pth`` is the epoch of the highest AUROC on them.

    Raises:
        UserError: when a block or the class labels cannot be used, for a cascade, or with several ranks.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = DEFAULT_DEVICE,
    ):
        # first: what does not fit leaves no folder behind
        self.settings = read_classification(plans)
        finetuning = read_finetuning(plans, configuration)
        self.labels = read_labels(plans)
        self.targets = chosen_targets(self.labels.targets, self.settings.targets)
        _refuse_ranks()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise UserError(
                f"{configuration} reads the segmentation of another configuration.",
                "Classify with 2d, 3d_fullres or 3d_lowres.",
            )
        self.finetuning = replace(
            finetuning, lr=self.settings.lr or finetuning.lr, optimiser=finetuning.optimiser or OPTIMISER
        )
        self.seed = SEED if finetuning.seed is None else finetuning.seed
        self.num_epochs = self.settings.epochs or finetuning.epochs or EPOCHS
        self.enable_deep_supervision = False
        self.loaded = FINAL
        """Kind of checkpoint whose weights the network has once it is not trained further."""
        self.best: tuple[float, float] | None = None

    # ------------------------------------------------------------------ building

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()
        self._log_settings()

    def do_split(self) -> tuple[list[str], list[str]]:
        """Training and validation cases: folds by subject, and only cases with a label."""
        return cases_of_fold(
            self.labels,
            self.fold,
            dataset_folder=self.preprocessed_dataset_folder_base,
            cases_folder=self.preprocessed_dataset_folder,
        )

    def _set_batch_size_and_oversample(self) -> None:
        """The batch size, and the steps of an epoch: each training case comes once where the plan says nothing."""
        train, _ = self.do_split()
        self.batch_size = self.settings.batch_size or self.configuration_manager.batch_size
        self.steps_per_epoch = (
            self.settings.iterations_per_epoch
            or self.finetuning.iterations_per_epoch
            or -(-len(train) // self.batch_size)
        )

    def configure_optimizers(self):
        """Put the classifier in the network's place, the one moment between building and training."""
        heads = {target.name: target.outputs for target in self.targets}
        if self.finetuning.fast:
            use_fast_blocks(self.network)
        if self.finetuning.recompute:
            recompute_activations(self.network)
        self.network = Classifier(
            self.network,
            input_channels=self.num_input_channels,
            heads=heads,
            stages=self.settings.stages,
            dropout=self.settings.dropout,
        ).to(self.device)
        if super()._do_i_compile():
            self.network.backbone.compile_parts()
        optimizer, schedule = planned_optimisation(
            self.network, self.finetuning, epochs=self.num_epochs, parts=self.network.parts()
        )
        self.initial_lr, self.weight_decay = schedule.lr, optimizer.defaults["weight_decay"]
        return optimizer, schedule

    def _do_i_compile(self) -> bool:
        """The classifier is not compiled as a whole; ``configure_optimizers`` compiles the encoder in place."""
        return False

    def _build_loss(self):
        train, _ = self.do_split()
        weights: list[Tensor | None] = [None] * len(self.targets)
        if self.settings.balance == "weights":
            weights = [w.to(self.device) for w in loss_weights(self.labels, self.targets, train)]
        return partial(joint_loss, targets=self.targets, weights=weights, smoothing=self.settings.label_smoothing)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The decoder takes no part."""

    def plot_network_architecture(self) -> None:
        """nnU-Net's plot feeds a segmentation network."""

    def get_dataloaders(self) -> tuple[BatchStream, BatchStream]:
        """Training batches from the present step on, and all validation cases for every epoch left."""
        train, validation = (
            ClassCases(self.preprocessed_dataset_folder, cases, labels=self.labels, targets=self.targets)
            for cases in self.do_split()
        )
        train.dataset = self.training_dataset(train.dataset)
        transform, size = self._augmentation()
        inputs = partial(case_inputs, **self.settings.input_arguments(size))
        weights = None
        if self.settings.balance == "sampling":
            weights = sampling_weights(self.labels, self.targets, train.names)
        batches = TrainingBatches(
            train, inputs, transform=transform, batch_size=self.batch_size, seed=self.seed, weights=weights
        )
        unchanged = ValidationBatches(validation, self._inputs(), batch_size=self.batch_size)
        self.num_val_iterations_per_epoch = len(unchanged)
        return streams_of(self, batches, unchanged)

    def training_dataset(self, dataset):
        """What training draws its cases from: nnU-Net's dataset of them, unless a subclass puts something around it."""
        return dataset

    def _inputs(self):
        """What the network sees of a case when nothing is random."""
        return partial(case_inputs, **self.settings.input_arguments(self.configuration_manager.patch_size))

    def _augmentation(self):
        """nnU-Net's augmentation, and the size of the windows that it cuts patches from."""
        patch = self.configuration_manager.patch_size
        rotation, dummy_2d, initial, mirrored = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.settings.mirror:
            mirrored = self.inference_allowed_mirroring_axes = None
        transform = repeatable(self.get_training_transforms(patch, rotation, None, mirrored, dummy_2d))
        # a resized case has nothing around it, a window of a case has
        return transform, [int(s) for s in initial] if self.settings.inputs == WINDOWS else patch

    # ------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        prepare_workers(get_allowed_n_proc_DA())
        if not self.was_initialized:
            self.initialize()
        if self.step == 0 and self.finetuning.weights is not None:
            path = Path(self.preprocessed_dataset_folder_base, self.finetuning.weights)
            report = load_planned_weights(self.network.backbone.network, path, plans_name=self.plans_manager.plans_name)
            self.print_to_log_file(f"Loaded pretrained weights from {path}\n{report.table()}", add_timestamp=False)
        super().on_train_start()
        self.loaded = FINAL

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        rest_at_test_mode(self.network)

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, with dropout seeded by its number."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, DROPOUT, self.step]).generate_state(1)[0]))
        return super().train_step(batch)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._log_value("train_losses", float(np.mean(self.epoch_losses)))
        self.epoch_losses = []

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.validation = ClassValidation(self.targets, self.labels.subjects)

    def validation_step(self, batch: dict) -> dict:
        logits = self.network.logits(batch["data"])
        labels = [label.to(self.device) for label in batch["target"]]
        self.validation.add(
            batch["case"], joint_probabilities(logits, self.targets), batch["target"], loss=self.loss(logits, labels)
        )
        return {}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        for name, value in self.validation.metrics().items():
            self._log_value(name, value)

    def on_epoch_end(self) -> None:
        self._log_value("epoch_end_timestamps", time.time())
        self.print_to_log_file(self.log.summary(self.current_epoch, self.num_epochs))
        self._keep_the_best()
        self.current_epoch += 1
        if self.pictures_are_due():
            draw_progress(self.log.history(), join(self.output_folder, "progress.png"), panels=PANELS)
        self.end_epoch()

    def _keep_the_best(self) -> None:
        """By AUROC, equal ones by the loss; by the loss alone where AUROC is not defined."""
        score = self.validation.score()
        if self.current_epoch == 0 and not self.validation.has_auroc():
            self.print_to_log_file(
                "The validation cases have one class only, so AUROC is not defined: the best epoch "
                "is the one of the smallest validation loss."
            )
        if self.best is None or score > self.best:
            self.best = score
            self.print_to_log_file(f"Best epoch so far: {self.current_epoch}")
            self.save_checkpoint(join(self.output_folder, FILES[BEST]))

    @torch.no_grad()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases with the weights that are loaded; write predictions, summary and figures.

        These are the final ones; with nnU-Net's ``--val_best`` those of the best epoch, which these cases chose: they
        get a folder of their own, whose every table says so.
        """
        self.print_to_log_file(f"Validating with the {self.loaded} checkpoint")
        cases = ClassCases(
            self.preprocessed_dataset_folder, self.do_split()[1], labels=self.labels, targets=self.targets
        )
        self.on_validation_epoch_start()
        batches = ValidationBatches(cases, self._inputs(), batch_size=1)
        for number in range(len(batches)):
            self.validation_step(batches[number])
        for line in self.validation.write(Path(self.output_folder, VALIDATION[self.loaded]), checkpoint=self.loaded):
            self.print_to_log_file(line)

    # ------------------------------------------------------------------ checkpoints

    def saved_network(self) -> Classifier:
        """The whole classifier."""
        return self.network

    def own_state(self) -> dict[str, Any]:
        """What rebuilds the classifier for prediction, and the best epoch so far."""
        return {
            BLOCK: {
                **targets_block(self.targets),
                "settings": asdict(self.settings),
                "best": self.best,
            }
        }

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self.loaded = BEST if str(filename_or_checkpoint).endswith(FILES[BEST]) else FINAL

    def check_is_resumable(self, checkpoint: dict[str, Any]) -> None:
        if BLOCK not in checkpoint:
            raise UserError("The checkpoint holds no classifier to continue.", "Start without --c.")
        super().check_is_resumable(checkpoint)

    def load_own_state(self, checkpoint: dict[str, Any]) -> None:
        super().load_own_state(checkpoint)
        state = checkpoint[BLOCK]
        self.best = state["best"]
        if "step" in state:  # of an earlier version
            self.step, self.epoch_losses = state["step"], list(state["epoch_losses"])

    # ------------------------------------------------------------------ logging

    def _log_value(self, name: str, value: float) -> None:
        self.log.add(name, float(value), self.current_epoch)

    def _log_settings(self) -> None:
        train, validation = self.do_split()
        lines = [
            f"Classification setting {f.name}: {f.default} → {getattr(self.settings, f.name)} (plan)"
            for f in fields(self.settings)
            if getattr(self.settings, f.name) != f.default
        ]
        lines += [
            f"{target.name} ({target.kind}), training: {frequencies(self.labels, target, train)}; validation: "
            f"{frequencies(self.labels, target, validation)}"
            for target in self.targets
        ]
        lines.append(
            f"{self.num_epochs} epochs of {self.steps_per_epoch} steps; {self.batch_size} cases of "
            f"{self.settings.windows_per_case} windows per step; {self.finetuning.optimiser}, learning rate "
            f"{self.initial_lr:g}; starts from {self.finetuning.weights or 'scratch'}"
        )
        slices = self.plans_manager.original_median_shape_after_transp[0]
        if len(self.configuration_manager.patch_size) == 2 and slices > 1 and self.settings.inputs != WINDOWS:
            lines.append(
                f"NOTE: a 2D network sees one slice of {slices:g}, the middle one. For several slices: "
                "nnssl_plugin plan --set classification.inputs=windows, or use a 3D configuration."
            )
        self.print_to_log_file("\n".join(lines), add_timestamp=False)


def _refuse_ranks() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            "A classifier trains on one device; this run has several ranks.",
            "Train without -num_gpus, --ranks or torchrun; folds can run side by side, one per GPU.",
        )
