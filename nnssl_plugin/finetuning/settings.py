"""The ``finetuning`` block of a plan: how long, how fast, and which parts of the network move when."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nnssl_plugin.errors import UserError
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, settings_from

BLOCK = "finetuning"

INFORMATION = ("source", "twin_of", "configuration")
"""Keys of the block that say where it comes from; they are not settings."""
METHOD = "method"
"""Part of the block with the settings of a method's own fine-tuning trainer; other trainers do not read it."""
NaturalNumber = Annotated[int, Range(ge=0)]


@dataclass(frozen=True)
class FinetuningSettings:
    """The ``finetuning`` block of a plan; ``null`` keeps what nnU-Net does for a network of this kind."""

    weights: str | None = None
    """File of weights, relative to the preprocessed dataset's folder; ``null`` trains from scratch."""
    trains: Literal["all", "decoder", "head"] = "all"
    """What ever moves: ``all``; ``decoder``, with the encoder as it was loaded; ``head``, the segmentation layers alone
    (a linear probe; in Primus the last up-sampling)."""
    frozen_encoder_epochs: NaturalNumber = 0
    """First epochs in which the encoder stays as it was loaded, on the schedule of the whole run."""
    decoder_warmup_epochs: NaturalNumber = 0
    """First epochs in which the decoder trains alone, on a short schedule of its own: linear warm-up over half of them,
    then the decay. Then everything starts with ``warmup_epochs`` ("sawtooth" in MIC-DKFZ's fine-tuning of nnssl
    weights, which takes 50 epochs of 1000)."""
    warmup_epochs: NonNegative | None = None
    """Epochs of linear warm-up before nnU-Net's polynomial decay; ``null`` is a twentieth of the epochs."""
    layer_decay: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each encoder stage to the next shallower one, in (0, 1]; the decoder has 1,
    the deepest stage ``layer_decay``, the stem and the first of n stages ``layer_decay ** n`` (Clark et al. 2020,
    ELECTRA, appendix A; Bao et al. 2022, BEiT). The stages of Primus are its transformer blocks, those of SwinUNETR
    the four of its transformer."""
    optimiser: Literal["sgd", "adamw"] | None = None
    """``sgd`` or ``adamw``; ``null`` is what nnU-Net's own trainers use: AdamW for Primus, and so for SwinUNETR and
    SegResNetDS, else SGD."""
    lr: Positive | None = None
    """Largest learning rate; ``null`` is nnU-Net's: 1e-2 for SGD, 3e-4 for AdamW."""
    weight_decay: NonNegative | None = None
    """``null`` is nnU-Net's: 3e-5 for SGD, 5e-2 for AdamW."""
    fast: bool = False
    """For CUDA: channels-last maps, and normalisation with activation as one step, in PlainConvUNet and
    ResidualEncoderUNet, in training as in prediction. Keys, checkpoints and, to rounding, results stay."""
    recompute: bool = False
    """Activation checkpointing: stages of U-Nets and blocks of transformers keep their inputs alone, and compute the
    rest again in the backward pass, for less memory at the time of one more forward. Results stay."""
    seed: NaturalNumber | None = None
    """Seed of the initialisation and, without worker processes (``nnUNet_n_proc_DA=0``), of the augmentation, so that
    arms differ in their weights alone; ``null`` draws anew in every run."""
    epochs: Count | None = None
    """``null`` is nnU-Net's 1000."""
    iterations_per_epoch: Count | None = None
    """Optimiser steps per epoch; ``null`` is nnU-Net's 250."""
    validation_iterations: Count | None = None
    """Validation batches per epoch; ``null`` is nnU-Net's 50."""

    def __post_init__(self) -> None:
        moving = {"layer_decay": 1.0, "frozen_encoder_epochs": 0, "decoder_warmup_epochs": 0}
        asked = [name for name, default in moving.items() if getattr(self, name) != default]
        if self.trains != "all" and asked:
            raise UserError(
                f"With finetuning.trains={self.trains} the encoder never moves, so {' and '.join(asked)} cannot apply.",
                f"Set finetuning.trains=all, or drop {' and '.join(asked)}.",
            )
        if self.frozen_encoder_epochs and self.decoder_warmup_epochs:
            raise UserError(
                "finetuning.frozen_encoder_epochs and finetuning.decoder_warmup_epochs both say how long "
                "the encoder waits.",
                "Keep the second for a warm-up of its own for each part.",
            )


def read_settings(plans: Mapping[str, Any], configuration: str) -> FinetuningSettings:
    """The settings of a plan's ``finetuning`` block.

    Raises:
        UserError: when the plan has no such block, its weights are for another configuration, or a setting is unknown,
            of the wrong kind or contradicts another.
    """
    name, block = plans.get("plans_name"), plans.get(BLOCK)
    if not isinstance(block, Mapping) or "weights" not in block:
        lacking = (
            "settings in its finetuning block, but no weights" if isinstance(block, Mapping) else "no finetuning block"
        )
        raise UserError(
            f"Plan {name} has {lacking}, so there is nothing to fine-tune from.",
            f"nnssl_plugin adapt -d ID -w CHECKPOINT -n NAME -p {name}, then train with -p {name}-NAME",
        )
    settings = settings_of(plans)
    adapted_to = block.get("configuration", configuration)
    if settings.weights is not None and adapted_to != configuration:
        raise UserError(
            f"The weights of plan {name} were adapted to {adapted_to}, not to {configuration}.",
            f"nnssl_plugin adapt -d ID -w CHECKPOINT -c {configuration} -n NAME",
        )
    return settings


def settings_of(plans: Mapping[str, Any], *, elsewhere: Iterable[str] = ()) -> FinetuningSettings:
    """The settings of a plan's ``finetuning`` block, whatever weights it names; the defaults where it has none.

    Raises:
        UserError: when a setting is unknown, of the wrong kind or contradicts another.
    """
    block = plans.get(BLOCK, {})
    if isinstance(block, Mapping):
        block = {key: value for key, value in block.items() if key not in (*INFORMATION, METHOD)}
    where = f"the {BLOCK} block of plan {plans.get('plans_name')}"
    return settings_from(block, FinetuningSettings(), where, set_as=f"{BLOCK}.", elsewhere=elsewhere)


def method_settings_of(plans: Mapping[str, Any], default: Any, *, elsewhere: Iterable[str] = ()) -> Any:
    """The settings of a method's own fine-tuning trainer; ``default`` with what a plan's block has under ``method``.

    Raises:
        UserError: when a setting is unknown or of the wrong kind.
    """
    block = plans.get(BLOCK, {})
    given = block.get(METHOD, {}) if isinstance(block, Mapping) else {}
    where = f"the {METHOD} part of the {BLOCK} block of plan {plans.get('plans_name')}"
    return settings_from(given, default, where, set_as=f"{BLOCK}.{METHOD}.", elsewhere=elsewhere)
