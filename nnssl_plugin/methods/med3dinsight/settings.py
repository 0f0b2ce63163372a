"""Every number of Med3DInsight: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.settings import TrainingSettings

FIELDS_OF_VIEW = ("window", "resize")
CORRUPTIONS = ("mask", "none")
OUTPUTS = ("residual", "attended")


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of the paper are marked [paper]; it is silent on the others.

    Raises:
        UserError: for a value outside its range.
    """

    queries: int = 300
    """Learnable queries Q [paper, IV-A]."""
    dim: int = 512
    """Width of the tokens and queries [paper, IV-A]; even, and a multiple of ``heads``."""
    layers: int = 2
    """Blocks of self-attention, cross-attention and MLP."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden width of the MLP over ``dim``."""
    slice_bins: int = 128
    """Slice positions J of the plane-slice embedding; the relative position of a slice falls into one of them."""
    output: str = "residual"
    """``residual``: queries with all they have read; ``attended``: what they find in the volume alone, so that the
    place, which they know, decides where is looked and is no part of what comes out."""
    mass: float = 0.9
    """Mass s that is transported, in (0, 1]; what is left unmatched is tolerance for wrong descriptions."""
    epsilon: float = 0.05
    """Entropic regularisation ε, relative to the largest cost."""
    iterations: int = 100
    """Iterations of the transport solver."""
    field_of_view: str = "window"
    """``window``: crops at the plan's spacing that contain the slice, as nnU-Net's fine-tuning sees voxels (95.23 Dice
    in table VI(g)); ``resize``: the whole case resized to the patch, the paper's main setting (94.75)."""
    centre: bool = True
    """Match volumes, slices and texts by what sets them apart from the others of their step: the mean of the step is
    taken off before they are compared. What all share tells nothing apart and makes all distances alike: volumes of an
    untrained network have a cosine of 0.999, slices under a random pair of encoders one of 0.7. False is the paper's
    reading."""
    corruption: str = "mask"
    """``mask``: the encoder sees the volume with blocks set to 0; ``none``: the clean volume, the literal Eq. 3, and no
    skip connections in the reconstruction, which would copy it."""
    mask_ratio: float = 0.6
    """Share of the blocks that is masked, in (0, 1)."""
    mask_block: int = 8
    """Edge of a block in voxels: 175 blocks in a patch of 40×56×40, 4,096 in one of 128³."""
    alignment_weight: float = 1.0
    """Factor of the two transport terms [paper, Eq. 4]."""
    reconstruction_weight: float = 1.0
    """Factor of the mean squared error [paper, Eq. 4]."""

    def __post_init__(self) -> None:
        wrong = next((name for name, fine in self._in_range().items() if not fine), None)
        if wrong is not None:
            raise UserError(
                f"Setting '{wrong}' of Med3DInsight cannot be {getattr(self, wrong)!r}.",
                "Its range stands in nnssl_plugin/methods/med3dinsight/settings.py.",
            )

    def _in_range(self) -> dict[str, bool]:
        counts = ("queries", "layers", "heads", "mlp_ratio", "slice_bins", "iterations", "mask_block")
        return {name: getattr(self, name) >= 1 for name in counts} | {
            "dim": self.dim >= 6 and self.dim % 2 == 0 and self.dim % max(self.heads, 1) == 0,
            "output": self.output in OUTPUTS,
            "mass": 0 < self.mass <= 1,
            "epsilon": self.epsilon > 0,
            "field_of_view": self.field_of_view in FIELDS_OF_VIEW,
            "corruption": self.corruption in CORRUPTIONS,
            "mask_ratio": 0 < self.mask_ratio < 1,
            "alignment_weight": self.alignment_weight >= 0,
            "reconstruction_weight": self.reconstruction_weight >= 0,
        }


TRAINING = TrainingSettings(epochs=300, batch_size=4, lr=2e-5, weight_decay=0.0)
"""Adam at 2e-5, 300 epochs, 4 volumes per GPU (section IV-A). nnU-Net's usual 2 would leave each transport problem a
single comparison; the paper solves 4 GPUs' 16 together where ranks are gathered."""
