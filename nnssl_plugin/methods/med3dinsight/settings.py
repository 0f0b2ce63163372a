"""Every number of Med3DInsight: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, NonNegative, Positive, Range


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of the paper are marked [paper]; it is silent on the others.

    Raises:
        UserError: when ``dim`` and ``heads`` do not go together.
    """

    queries: Count = 300
    """Learnable queries Q [paper, IV-A]."""
    dim: Annotated[int, Range(ge=6)] = 512
    """Width of the tokens and queries [paper, IV-A]; even, and a multiple of ``heads``."""
    layers: Count = 2
    """Blocks of self-attention, cross-attention and MLP."""
    heads: Count = 8
    """Attention heads."""
    mlp_ratio: Count = 4
    """Hidden width of the MLP over ``dim``."""
    slice_bins: Count = 128
    """Slice positions J of the plane-slice embedding; the relative position of a slice falls into one of them."""
    output: Literal["residual", "attended"] = "residual"
    """``residual``: queries with all they have read; ``attended``: what they find in the volume alone, so that the
    place, which they know, decides where is looked and is no part of what comes out."""
    mass: Annotated[float, Range(gt=0, le=1)] = 0.9
    """Mass s that is transported, in (0, 1]; what is left unmatched is tolerance for wrong descriptions."""
    epsilon: Positive = 0.05
    """Entropic regularisation ε, relative to the largest cost."""
    iterations: Count = 100
    """Greatest number of iterations of the transport solver."""
    solver: Literal["log", "pot"] = "log"
    """``log``: all transport problems of a step at once, on the device; ``pot``: POT's entropic solver, one after the
    other, for comparison. Both find the same plan and have the same gradient."""
    project_every: Count = 10
    """Steps between two projections of the metric, which is projected after the last step, too; 1 is the paper's."""
    field_of_view: Literal["window", "resize"] = "window"
    """``window``: crops at the plan's spacing that contain the slice, as nnU-Net's fine-tuning sees voxels (95.23 Dice
    in table VI(g)); ``resize``: the whole case resized to the patch, the paper's main setting (94.75)."""
    centre: bool = True
    """Match volumes, slices and texts by what sets them apart from the others of their step: the mean of the step is
    taken off before they are compared. What all share tells nothing apart and makes all distances alike: volumes of an
    untrained network have a cosine of 0.999, slices under a random pair of encoders one of 0.7. False is the paper's
    reading."""
    corruption: Literal["mask", "none"] = "mask"
    """``mask``: the encoder sees the volume with blocks set to 0; ``none``: the clean volume, the literal Eq. 3, and no
    skip connections in the reconstruction, which would copy it."""
    mask_ratio: Annotated[float, Range(gt=0, lt=1)] = 0.6
    """Share of the blocks that is masked, in (0, 1)."""
    mask_block: Count = 8
    """Edge of a block in voxels: 175 blocks in a patch of 40×56×40, 4,096 in one of 128³."""
    alignment_weight: NonNegative = 1.0
    """Factor of the two transport terms [paper, Eq. 4]."""
    reconstruction_weight: NonNegative = 1.0
    """Factor of the mean squared error [paper, Eq. 4]."""

    def __post_init__(self) -> None:
        if self.dim % 2 or self.dim % self.heads:
            raise UserError(
                f"Setting 'dim' of Med3DInsight is {self.dim}; it must be even and a multiple of heads ({self.heads}).",
                f"For example: nnssl_plugin plan -d ID -p PLANS -n NAME --set method.dim={64 * self.heads}",
            )


TRAINING = TrainingSettings(epochs=300, batch_size=4, lr=2e-5, weight_decay=0.0)
"""Adam at 2e-5, 300 epochs, 4 volumes per GPU (section IV-A). nnU-Net's usual 2 would leave each transport problem a
single comparison; the paper solves 4 GPUs' 16 together where ranks are gathered."""
