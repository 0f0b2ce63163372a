"""Settings of S2DC: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.settings import TrainingSettings

ASSIGNMENTS = ("dual_softmax", "sinkhorn")


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of the paper are marked [paper], of its public code [code].

    Raises:
        UserError: for a value outside its range.
    """

    grid: tuple[int, ...] = (1, 1, 1)
    """Sub-volumes of the plan's patch size per axis of the plan (the last two in 2D) that one window is cut into. The
    code has 4×4 of them in a plane; one nnU-Net patch at stride 16 gives as many tokens at a sixteenth of the cost."""
    token_stride: int = 16
    """Tokens come from the finest stage with at least this stride in voxels, from the bottleneck where none has it."""
    hidden: int = 2048
    """Width of the hidden layers of both heads [code]."""
    dim: int = 512
    """Width of the projected features [code]."""
    queue: int = 1024
    """Features of earlier steps that serve as negatives of the global term."""
    momentum: float = 0.999
    """Share of its own weights that the teacher keeps in a step, in [0, 1] [code]."""
    temperature: float = 0.2
    """τ of the global term, Eq. 1 (MoCo v2's; features have length 1)."""
    assignment: str = "dual_softmax"
    """``dual_softmax`` [paper] or ``sinkhorn`` (optimal transport with a dustbin [code])."""
    matching_temperature: float = 0.1
    """Divides the cosines of tokens before the assignment (LoFTR's). At 1, as printed, the loss of 144 tokens cannot
    fall below 7.95."""
    sinkhorn_iterations: int = 100
    """Iterations of ``sinkhorn`` [code]."""
    dustbin: float = 1.0
    """Score of staying unmatched in ``sinkhorn``, on the scale of the divided cosines [code]."""
    negatives: bool = False
    """Whether patches that do not correspond are pushed apart one by one too [code]."""
    detach_weights: bool = True
    """Whether no gradient flows through the weights of Eq. 7: they are a "soft label"."""
    global_weight: float = 1.0
    """Factor of L_g [paper, Eq. 9]."""
    p2p_weight: float = 1.0
    """Factor of L_p2p [paper, Eq. 9]."""
    p2s_weight: float = 1.0
    """Factor of L_p2s [paper, Eq. 9]."""
    rotation: float = 30.0
    """Largest rotation of the second view in degrees [code]."""
    scale: tuple[float, ...] = (0.9, 1.2)
    """Smallest and largest scale of the second view [code]."""
    translation: float = 0.0625
    """Largest shift of the second view, in windows: 24 of 384 voxels [code]."""
    flip: float = 0.0
    """Probability that an axis of the second view is mirrored."""
    in_plane: bool | None = None
    """Whether the second view turns within the slices only; ``None``: where slices are much thicker than pixels."""
    copy_rotation: float = 20.0
    """With several sub-volumes: largest rotation in degrees of the one that the global term compares [code]."""
    copy_scale: tuple[float, ...] = (0.95, 1.05)
    """Its scales [code]."""
    copy_translation: float = 0.25
    """Its largest shift, in patches: 24 of 96 voxels [code]."""
    intensity_probability: float = 0.5
    """Probability of each change of intensity, per sample and channel."""
    intensity_shift: float = 0.1
    """Largest shift, in standard deviations of the channel."""
    intensity_scale: float = 0.25
    """Largest change of contrast about the channel's mean, as a share (nnU-Net's own)."""
    intensity_noise: float = 0.1
    """Largest standard deviation of Gaussian noise, in standard deviations of the channel."""

    def __post_init__(self) -> None:
        wrong = next((name for name, fine in self._in_range().items() if not fine), None)
        if wrong is not None:
            raise UserError(
                f"Setting '{wrong}' of S2DC cannot be {getattr(self, wrong)!r}.",
                "Its range stands in nnssl_plugin/methods/s2dc/settings.py.",
            )

    def _in_range(self) -> dict[str, bool]:
        counts = ("token_stride", "hidden", "dim", "queue", "sinkhorn_iterations")
        positive = ("temperature", "matching_temperature")
        from_zero = ("global_weight", "p2p_weight", "p2s_weight", "intensity_shift", "intensity_noise")
        shares = ("momentum", "flip", "intensity_probability", "intensity_scale")
        below_one = ("translation", "copy_translation")
        return (
            {name: getattr(self, name) >= 1 for name in counts}
            | {name: getattr(self, name) > 0 for name in positive}
            | {name: getattr(self, name) >= 0 for name in from_zero}
            | {name: 0 <= getattr(self, name) <= 1 for name in shares}
            | {name: 0 <= getattr(self, name) < 1 for name in below_one}
            | {name: 0 <= getattr(self, name) <= 180 for name in ("rotation", "copy_rotation")}
            | {name: _is_range(getattr(self, name)) for name in ("scale", "copy_scale")}
            | {
                "grid": len(self.grid) == 3 and all(type(size) is int and size >= 1 for size in self.grid),
                "assignment": self.assignment in ASSIGNMENTS,
                "in_plane": self.in_plane is None or type(self.in_plane) is bool,
            }
        )


def _is_range(values: tuple) -> bool:
    return len(values) == 2 and all(isinstance(v, int | float) for v in values) and 0 < values[0] <= values[1]


TRAINING = TrainingSettings(epochs=400, lr=3e-4, weight_decay=0.1, warmup_epochs=2.0)
"""100,000 steps [paper]; AdamW, learning rate, weight decay and 500 steps of warm-up are those of the public code."""
