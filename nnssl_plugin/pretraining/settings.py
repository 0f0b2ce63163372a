"""How long and how fast a method is trained, and for which method: the ``pretraining`` block of a plan."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.sources import DataSource
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, settings_from

BLOCK = "pretraining"
METHOD = "method"
"""Key of the block that holds the method's own settings."""
METHOD_NAME = "method_name"
"""Key of the block that says which method ``method`` is for; presets write it, older plans lack it."""
OTHERS = ("weights", METHOD, METHOD_NAME)
"""Keys of the block that are not fields of :class:`TrainingSettings`."""

BelowOne = Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast a method is trained: the ``pretraining`` block of a plan, except its ``method`` part."""

    epochs: Count = 300
    """Length of the run, whatever the number of cases."""
    iterations_per_epoch: Count = 250
    """Optimiser steps per epoch (250 is nnU-Net's)."""
    validation_iterations: Annotated[int, Range(ge=0)] = 10
    """Batches per epoch, always the same ones, on which losses and collapse measures are logged."""
    batch_size: Count | None = None
    """Samples per rank and step; ``null`` is the plan's. A method may have its own default."""
    chunk_size: Count | None = None
    """Samples encoded at a time; fewer than the step has make a virtual batch: its gradients at the memory of a chunk
    and the cost of one more forward. ``null`` encodes the batch at once."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """``adamw``, or ``sgd`` with Nesterov's momentum."""
    lr: Positive = 1e-3
    """Largest learning rate; ``schedule`` leads down from it. Each method has its own default."""
    schedule: Literal["cosine", "halving", "poly"] = "cosine"
    """``cosine``: half a cosine to 0; ``poly``: (1 - p) ** 0.9 to 0, nnU-Net's; ``halving``: halved after each fifth of
    the run, four times."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up before the schedule."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Of AdamW."""
    momentum: BelowOne = 0.99
    """Of SGD (0.99 is nnU-Net's)."""
    weight_decay: NonNegative = 0.0
    """Weight decay: decoupled from the gradient in AdamW, through the gradient in SGD."""
    weight_decay_end: NonNegative | None = None
    """Weight decay at the end of the run, reached along half a cosine; ``null`` keeps ``weight_decay`` throughout."""
    layer_decay: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each encoder stage to the next shallower one: the deepest has ``layer_decay``,
    everything outside the encoder 1."""
    batch_norm: Literal["averaged", "synchronised"] = "averaged"
    """Of networks with batch normalisation, on several ranks: ``averaged`` normalises on each rank by its own samples
    and averages the running statistics after every step; ``synchronised`` normalises by the samples of all ranks, on
    CUDA alone. Such networks take no ``chunk_size``."""
    fast: bool | None = None
    """Channels-last maps, and normalisation with activation as one step, in PlainConvUNet and ResidualEncoderUNet, in
    place of torch.compile; ``null``: on CUDA, where the network is one of them. Keys and, to rounding, results stay."""
    recompute: bool = False
    """Activation checkpointing: stages of U-Nets and blocks of transformers keep their inputs alone, and compute the
    rest again in the backward pass, for less memory at the time of one more forward. Results stay."""
    gradient_clip: Positive = 12.0
    """Largest norm of the gradient (12 is nnU-Net's)."""
    seed: Annotated[int, Range(ge=0)] = 12345
    """Batches, views and dropout of step k depend on (seed, rank, k) alone; also of the initialisation."""
    figure_every: Count = 10
    """Epochs between two pictures of reconstructions and the like."""
    probe_every: Annotated[int, Range(ge=0)] = 0
    """Epochs between two probes, on a dataset with labels of structures: the Dice of a linear readout of the encoder as
    it is, fitted to 5 cases and measured on up to 20 others. 0: none."""
    sources: tuple[DataSource, ...] = ()
    """Datasets to pretrain on; none is the one that the command names, alone. Its plan gives the network all the
    same."""
    max_skipped_in_a_row: Count = 50
    """Steps with a non-finite loss or gradient in a row that end the run."""


def read_settings(
    plans: Mapping[str, Any],
    method: str,
    training_defaults: TrainingSettings,
    method_defaults: Any,
    *,
    elsewhere: Iterable[str] = (),
) -> tuple[TrainingSettings, Any]:
    """The settings of a plan's ``pretraining`` block for a method: of the training, and the method's own.

    Raises:
        UserError: when the block is for another method, or a setting is unknown, of the wrong kind or contradicts
            another.
    """
    name, block = plans.get("plans_name"), plans.get(BLOCK, {})
    training = read_training_settings(plans, training_defaults, elsewhere=elsewhere)
    planned_for = block.get(METHOD_NAME) or method
    if planned_for != method:
        raise UserError(
            f"The pretraining block of plan {name} is for the method {planned_for}, not for {method}.",
            f"Train it with the trainer of {planned_for}, or write a plan for this one: "
            f"nnssl_plugin plan -d ID -p nnUNetPlans -n NAME --preset {method}",
        )
    return training, settings_from(
        block.get(METHOD, {}),
        method_defaults,
        f"the {METHOD} part of the pretraining block of plan {name}, for {method}",
        set_as=f"{METHOD}.",
        elsewhere=elsewhere,
    )


def read_training_settings(
    plans: Mapping[str, Any], defaults: TrainingSettings, *, elsewhere: Iterable[str] = ()
) -> TrainingSettings:
    """The settings of a plan's ``pretraining`` block that every method has.

    Raises:
        UserError: when a setting is unknown, of the wrong kind or contradicts another.
    """
    block = plans.get(BLOCK, {})
    if isinstance(block, Mapping):
        block = {key: value for key, value in block.items() if key not in OTHERS}
    return settings_from(
        block, defaults, f"the pretraining block of plan {plans.get('plans_name')}", elsewhere=elsewhere
    )


def changed_settings(chosen: Any, default: Any) -> list[str]:
    """A line ``NAME: DEFAULT → CHOSEN`` for each field of two instances of a dataclass in which they differ."""
    values = asdict(chosen)
    return [f"{name}: {value} → {values[name]}" for name, value in asdict(default).items() if values[name] != value]
