"""Fine-tuning of pretrained weights for segmentation, as the plan's ``finetuning`` block says."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnssl_plugin.checkpoints.adaptation import MIN_COVERAGE, adapt_weights, check_coverage
from nnssl_plugin.checkpoints.files import read_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.pretext import settings_from
from nnssl_plugin.training.schedules import PolySchedule

INFORMATION = ("source", "twin_of", "configuration")
"""Keys of the block that say where it comes from; they are not settings."""
WARMUP = 0.05
"""Fraction of the epochs that warm up where the plan says nothing: 50 of nnU-Net's 1000."""


@dataclass(frozen=True)
class FinetuningSettings:
    """The ``finetuning`` block of a plan; ``null`` keeps what nnU-Net does."""

    weights: str | None = None
    """File of weights, relative to the preprocessed dataset's folder; ``null`` trains from scratch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up before nnU-Net's polynomial decay; ``null`` is a twentieth of the epochs."""
    lr: float | None = None
    """Largest learning rate; ``null`` is nnU-Net's 1e-2."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each encoder stage to the next shallower one, in (0, 1]; the decoder has 1,
    the deepest stage ``layer_decay``, the stem and the first of n stages ``layer_decay ** n`` (Clark et al. 2020,
    ELECTRA, appendix A; Bao et al. 2022, BEiT)."""
    frozen_encoder_epochs: int = 0
    """First epochs in which the encoder stays as it was loaded."""
    seed: int | None = None
    """Seed of the initialisation and, without worker processes (``nnUNet_n_proc_DA=0``), of the augmentation, so that
    arms differ in their weights alone; ``null`` draws anew in every run."""
    epochs: int | None = None
    iterations_per_epoch: int | None = None
    validation_iterations: int | None = None

    def __post_init__(self):
        self._require("weights", "a file name or null", isinstance(self.weights, str | None))
        for name in ("warmup_epochs", "lr"):
            value = getattr(self, name)
            fits = value is None or (_is_number(value) and value >= 0 and (name != "lr" or value > 0))
            self._require(name, "a positive number or null", fits)
        self._require("layer_decay", "a number in (0, 1]", 0 < self.layer_decay <= 1)
        self._require("frozen_encoder_epochs", "a number of epochs", self.frozen_encoder_epochs >= 0)
        for name, least in (("epochs", 1), ("iterations_per_epoch", 1), ("validation_iterations", 1), ("seed", 0)):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
            self._require(name, f"a whole number from {least} or null", fits)

    def _require(self, name: str, expected: str, fits: bool) -> None:
        if not fits:
            raise UserError(f"Setting '{name}' in the plan's finetuning block is {getattr(self, name)!r}; expected "
                            f"{expected}.", f"nnssl_plugin plan -d ID -p PLANS -n NAME --set finetuning.{name}=…")


def read_settings(plans: Mapping[str, Any], configuration: str) -> FinetuningSettings:
    """The settings of a plan's ``finetuning`` block.

    Raises:
        UserError: when the plan has no such block, its weights are for another configuration, or a setting is unknown
            or of the wrong kind.
    """
    name, block = plans.get("plans_name"), plans.get("finetuning")
    if not isinstance(block, Mapping) or "weights" not in block:
        raise UserError(f"Plan {name} has no finetuning block, so there is nothing to fine-tune from.",
                        f"nnssl_plugin adapt -d ID -w CHECKPOINT -n NAME -p {name}, then train with -p {name}-NAME")
    settings = settings_from({key: value for key, value in block.items() if key not in INFORMATION},
                             FinetuningSettings(), f"the finetuning block of {name}")
    adapted_to = block.get("configuration", configuration)
    if settings.weights is not None and adapted_to != configuration:
        raise UserError(f"The weights of plan {name} were adapted to {adapted_to}, not to {configuration}.",
                        f"nnssl_plugin adapt -d ID -w CHECKPOINT -c {configuration} -n NAME")
    return settings


class PretrainedSegmentationTrainer(nnUNetTrainer):
    """nnU-Net's trainer from pretrained weights: warm-up, then the planned schedule.

    The weights are loaded when a training starts, not when it is resumed, validated or used for prediction. What
    pretraining did not train keeps the initialisation of this run, so folds differ in it as they do in nnU-Net.

    Raises:
        UserError: when the plan has no ``finetuning`` block, or one that does not fit.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):  # noqa: B008 (nnU-Net's signature)
        self.settings = read_settings(plans, configuration)  # first: a plan that does not fit leaves no folder behind
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.settings.lr or self.initial_lr
        self.num_epochs = self.settings.epochs or self.num_epochs
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch or self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.validation_iterations or self.num_val_iterations_per_epoch
        self._log_settings()

    def initialize(self):
        if self.settings.seed is not None:
            random.seed(self.settings.seed)
            np.random.seed(self.settings.seed)
            torch.manual_seed(self.settings.seed)
        super().initialize()

    def configure_optimizers(self):
        optimizer, _ = super().configure_optimizers()
        groups = parameter_groups(_bare(self.network), layer_decay=self.settings.layer_decay,
                                  frozen_until=self.settings.frozen_encoder_epochs)
        optimizer = type(optimizer)(groups, **optimizer.defaults)
        optimizer.register_step_pre_hook(skip_frozen)
        warmup = self.settings.warmup_epochs
        warmup = WARMUP * self.num_epochs if warmup is None else warmup
        return optimizer, PolySchedule(optimizer, lr=self.initial_lr, total=self.num_epochs, warmup=warmup)

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if self.current_epoch == 0 and self.settings.weights is not None:
            self.load_pretrained_weights()
        super().on_train_start()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        groups = self.optimizer.param_groups
        if len(groups) > 1:
            rates = ", ".join(f"{group['name']} {np.round(group['lr'], 6)}" for group in groups)
            self.print_to_log_file(f"Learning rates: {rates}")

    def load_pretrained_weights(self) -> None:
        """Put the plan's weights into the network and log how much of it they cover.

        Raises:
            UserError: when the file is missing or unreadable, or covers less of the encoder than when it was written.
        """
        path = Path(self.preprocessed_dataset_folder_base, self.settings.weights)
        if not path.is_file():
            raise UserError(f"The weights {path} of plan {self.plans_manager.plans_name} are not there.",
                            "Copy them there, or write them again with nnssl_plugin adapt.")
        content = read_checkpoint(path)
        adaptation = content.get("adaptation", {})
        trained = adaptation.get("loaded", content.get("provenance", {}).get("trained"))
        network = _bare(self.network)
        state, report = adapt_weights(content["network_weights"], network, trained=trained)
        check_coverage(report, minimum=adaptation.get("encoder_coverage", MIN_COVERAGE))
        network.load_state_dict(state)
        self.print_to_log_file(f"Loaded pretrained weights from {path}\n{report.table()}", add_timestamp=False)

    def _log_settings(self) -> None:
        changed = [f"{f.name}: {f.default} → {getattr(self.settings, f.name)}" for f in fields(self.settings)
                   if getattr(self.settings, f.name) != f.default]
        self.print_to_log_file("Fine-tuning settings that differ from the default:\n"
                               + ("\n".join(changed) or "none"), add_timestamp=False)


def parameter_groups(network: nn.Module, *, layer_decay: float, frozen_until: int) -> list[dict[str, Any]]:
    """Groups for the optimiser: the decoder first (nnU-Net logs the first group's rate), then the encoder's stages.

    Every parameter is in one group, those that encoder and decoder share in the encoder's. The stem counts to the
    first stage.

    Args:
        network: the bare network.
        layer_decay: factor of the rate from a stage to the next shallower one, in (0, 1].
        frozen_until: first epoch in which the encoder moves.

    Returns:
        one group of everything where neither is asked for; else groups with ``lr_scale`` and ``frozen_until``.

    Raises:
        UserError: for a network whose encoder has no stages.
    """
    if layer_decay == 1 and not frozen_until:
        return [{"params": list(network.parameters()), "name": "network", "lr_scale": 1.0, "frozen_until": 0}]
    encoder = getattr(network, "encoder", None)
    if encoder is None or not hasattr(encoder, "stages"):
        raise UserError(f"{type(network).__name__} has no encoder stages, which layer_decay and frozen_encoder_epochs "
                        "need.", "Set finetuning.layer_decay=1 and finetuning.frozen_encoder_epochs=0.")
    stages = [list(stage.parameters()) for stage in encoder.stages]
    if getattr(encoder, "stem", None) is not None:
        stages[0] = [*encoder.stem.parameters(), *stages[0]]
    staged = {id(p) for stage in stages for p in stage}
    rest = [p for p in network.parameters() if id(p) not in staged]
    return [{"params": rest, "name": "decoder", "lr_scale": 1.0, "frozen_until": 0}] + [
        {"params": stage, "name": f"encoder stage {depth}", "lr_scale": layer_decay ** (len(stages) - depth),
         "frozen_until": frozen_until}
        for depth, stage in enumerate(stages)
    ]


def skip_frozen(optimizer: Optimizer, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a step: drop the gradients of groups whose rate is 0, so that they gather no momentum either.

    Frozen parameters keep their ``requires_grad``, as ranks and compiled networks fix it when they are wrapped; their
    gradients still count in the norm that nnU-Net clips.
    """
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def _bare(network: nn.Module) -> nn.Module:
    network = network.module if isinstance(network, DistributedDataParallel) else network
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
