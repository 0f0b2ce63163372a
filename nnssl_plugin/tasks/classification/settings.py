"""The ``classification`` block of a plan: what is predicted, what the network sees of a case, and how it is trained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.settings import FinetuningSettings, read_settings
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, settings_from
from nnssl_plugin.tasks.classification.batches import WINDOWS

BLOCK = "classification"
OPTIMISER = "adamw"
"""Where the plan's finetuning block names none (BrainMVP, B.2 and B.3; LVM-Med, B, takes Adam)."""
EPOCHS = 200
"""Where the plan names no number (BrainMVP, B.3)."""
SEED = 12345
BelowOne = Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True)
class ClassificationSettings:
    """The ``classification`` block of a plan.

    ``lr``, ``epochs`` and ``iterations_per_epoch`` go before those of the ``finetuning`` block, which holds everything
    else that moves weights: where they come from, what is frozen, warm-up, layer decay, optimiser, weight decay, seed.
    """

    targets: tuple[str, ...] = ()
    """Names of the targets to learn, all at once; none names all."""
    inputs: Literal["resize", "windows"] = "resize"
    """``resize``: the whole image resized to the patch (BrainMVP, B.3; LVM-Med, B); ``windows``: several patches of the
    case as it is, weighed by attention, for findings that resizing would lose."""
    windows: Count = 4
    """Patches per case, with ``inputs`` ``windows``; memory grows with it times the batch size."""
    crop: Literal["none", "foreground"] = "none"
    """``foreground``: the network sees the box around the segmentation's labels only. New cases then need a
    segmentation too."""
    crop_margin: NonNegative = 0.1
    """Added on each side of the box, as a fraction of its size."""
    mirror: bool = True
    """Whether the augmentation mirrors as nnU-Net does; ``false`` where left and right are different classes."""
    balance: Literal["weights", "sampling", "none"] = "weights"
    """``weights``: rare classes count more in the loss; ``sampling``: they are drawn more often; ``none``: as they
    come, which keeps probabilities at the frequencies of the training cases."""
    label_smoothing: BelowOne = 0.0
    """Share of a label that is spread over all answers."""
    dropout: BelowOne = 0.0
    """Of the pooled features before the heads."""
    stages: Count = 1
    """Pooled stages of the encoder, counted from the bottleneck (LVM-Med, B: one layer on the encoder's last map)."""
    lr: Positive | None = None
    """Largest learning rate; ``null``: that of the finetuning block, else 3e-4 for AdamW (BrainMVP, B.2), 1e-2 for
    SGD."""
    epochs: Count | None = None
    """``null``: those of the finetuning block, else 200 (BrainMVP, B.3)."""
    iterations_per_epoch: Count | None = None
    """``null``: those of the finetuning block, else as many as show each training case once."""
    batch_size: Count | None = None
    """Cases per step; ``null`` is the plan's batch size."""

    @property
    def windows_per_case(self) -> int:
        """W of the inputs (W, C, *patch) of a case."""
        return self.windows if self.inputs == WINDOWS else 1

    def input_arguments(self, patch_size: Sequence[int]) -> dict[str, Any]:
        """Arguments of ``class_batches.case_inputs`` for windows of ``patch_size`` voxels."""
        return {
            "crop": self.crop,
            "crop_margin": self.crop_margin,
            "patch_size": list(patch_size),
            "strategy": self.inputs,
            "windows": self.windows,
        }


def read_classification(plans: Mapping[str, Any], *, elsewhere: Iterable[str] = ()) -> ClassificationSettings:
    """The settings of a plan's ``classification`` block; the defaults where it has none.

    Raises:
        UserError: a setting is unknown or of the wrong kind.
    """
    where = f"the {BLOCK} block of plan {plans.get('plans_name')}"
    block = plans.get(BLOCK, {})
    return settings_from(block, ClassificationSettings(), where, set_as=f"{BLOCK}.", elsewhere=elsewhere)


def read_finetuning(plans: Mapping[str, Any], configuration: str) -> FinetuningSettings:
    """The settings of a plan's ``finetuning`` block; from scratch where it has none, or names no weights.

    Raises:
        UserError: as :func:`finetuning_settings.read_settings`, or it trains the decoder alone, which takes no part.
    """
    if "finetuning" not in plans:
        return FinetuningSettings()
    block = plans["finetuning"]
    if isinstance(block, Mapping) and "weights" not in block:
        plans = {**plans, "finetuning": {**block, "weights": None}}
    settings = read_settings(plans, configuration)
    if settings.trains == "decoder":
        raise UserError(
            "finetuning.trains=decoder cannot apply: a classifier has no decoder.",
            "Set finetuning.trains=head for a linear probe, or all.",
        )
    return settings


def chosen_targets(targets: Sequence[Target], names: Sequence[str]) -> tuple[Target, ...]:
    """The targets of these names, in their order in the dataset; all where none is named.

    Raises:
        UserError: when the dataset has no such target.
    """
    unknown = sorted(set(names) - {target.name for target in targets})
    if unknown:
        raise UserError(
            f"The plan's classification block names the target {unknown[0]!r}; the dataset has: "
            f"{', '.join(target.name for target in targets)}.",
            f"nnssl_plugin plan -d ID -p PLANS -n NAME --set '{BLOCK}.targets=[\"{targets[0].name}\"]'",
        )
    return tuple(target for target in targets if not names or target.name in names)
