"""Settings of S2DC: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, Share

Degrees = Annotated[float, Range(ge=0, le=180)]
BelowOne = Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of the paper are marked [paper], of its public code [code].

    Raises:
        UserError: when a smallest scale is larger than the largest.
    """

    grid: tuple[Count, Count, Count] = (1, 1, 1)
    """Sub-volumes of the plan's patch size per axis of the plan (the last two in 2D) that one window is cut into. The
    code has 4×4 of them in a plane; one nnU-Net patch at stride 16 gives as many tokens at a sixteenth of the cost."""
    token_stride: Count = 16
    """Tokens come from the finest stage with at least this stride in voxels, from the bottleneck where none has it."""
    hidden: Count = 2048
    """Width of the hidden layers of both heads [code]."""
    dim: Count = 512
    """Width of the projected features [code]."""
    queue: Count = 1024
    """Features of earlier steps that serve as negatives of the global term."""
    momentum: Share = 0.999
    """Share of its own weights that the teacher keeps in a step, in [0, 1] [code]."""
    temperature: Positive = 0.2
    """τ of the global term, Eq. 1 (MoCo v2's; features have length 1)."""
    assignment: Literal["dual_softmax", "sinkhorn"] = "dual_softmax"
    """``dual_softmax`` [paper] or ``sinkhorn`` (optimal transport with a dustbin [code])."""
    matching_temperature: Positive = 0.1
    """Divides the cosines of tokens before the assignment (LoFTR's). At 1, as printed, the loss of 144 tokens cannot
    fall below 7.95."""
    sinkhorn_iterations: Count = 100
    """Iterations of ``sinkhorn`` [code]."""
    dustbin: float = 1.0
    """Score of staying unmatched in ``sinkhorn``, on the scale of the divided cosines [code]."""
    negatives: bool = False
    """Whether patches that do not correspond are pushed apart one by one too [code]."""
    detach_weights: bool = True
    """Whether no gradient flows through the weights of Eq. 7: they are a "soft label"."""
    global_weight: NonNegative = 1.0
    """Factor of L_g [paper, Eq. 9]."""
    p2p_weight: NonNegative = 1.0
    """Factor of L_p2p [paper, Eq. 9]."""
    p2s_weight: NonNegative = 1.0
    """Factor of L_p2s [paper, Eq. 9]."""
    rotation: Degrees = 30.0
    """Largest rotation of the second view in degrees [code]."""
    scale: tuple[Positive, Positive] = (0.9, 1.2)
    """Smallest and largest scale of the second view [code]."""
    translation: BelowOne = 0.0625
    """Largest shift of the second view, in windows: 24 of 384 voxels [code]."""
    flip: Share = 0.0
    """Probability that an axis of the second view is mirrored."""
    in_plane: bool | None = None
    """Whether the second view turns within the slices only; ``None``: where slices are much thicker than pixels."""
    copy_rotation: Degrees = 20.0
    """With several sub-volumes: largest rotation in degrees of the one that the global term compares [code]."""
    copy_scale: tuple[Positive, Positive] = (0.95, 1.05)
    """Its scales [code]."""
    copy_translation: BelowOne = 0.25
    """Its largest shift, in patches: 24 of 96 voxels [code]."""
    intensity_probability: Share = 0.5
    """Probability of each change of intensity, per sample and channel."""
    intensity_shift: NonNegative = 0.1
    """Largest shift, in standard deviations of the channel."""
    intensity_scale: Share = 0.25
    """Largest change of contrast about the channel's mean, as a share (nnU-Net's own)."""
    intensity_noise: NonNegative = 0.1
    """Largest standard deviation of Gaussian noise, in standard deviations of the channel."""

    def __post_init__(self) -> None:
        for name, (smallest, largest) in {"scale": self.scale, "copy_scale": self.copy_scale}.items():
            if smallest > largest:
                raise UserError(
                    f"Setting '{name}' of S2DC is [{smallest}, {largest}]; the smallest comes first.",
                    f"nnssl_plugin plan -d ID -p PLANS -n NAME --set 'method.{name}=[{largest},{smallest}]'",
                )


TRAINING = TrainingSettings(epochs=400, lr=3e-4, weight_decay=0.1, warmup_epochs=2.0)
"""100,000 steps [paper]; AdamW, learning rate, weight decay and 500 steps of warm-up are those of the public code."""
