"""Settings of M3Ret's SimDINO: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.methods.m3ret.settings import InputSettings
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, NonNegative, Positive, Range

Side = Annotated[float, Range(gt=0, le=1)]


@dataclass(frozen=True)
class Settings(InputSettings):
    """Settings of M3Ret's SimDINO. [paper] section 3.3 and appendix B, [SimDINO] its code, [choice] ours."""

    local_views: Annotated[int, Range(ge=0)] = 2
    """Small views beside the two global ones. The paper has 10 of images and 4 of videos and volumes, and finds that
    their number hardly matters (figure 3a)."""
    local_views_of_volumes: Annotated[int, Range(ge=0)] | None = None
    """Of inputs with several slices, where they are to be fewer; `null` for as many as `local_views`."""
    global_side: tuple[Side, Side] = (0.63, 1.0)
    """Least and greatest side of a global view over that of the image; the paper gives none. The square roots of DINO's
    shares of the area, 0.4 to 1 [choice]."""
    local_side: tuple[Side, Side] = (0.22, 0.63)
    """The same of a local view; the square roots of 0.05 and 0.4 [choice]."""
    local_size: Side = 0.375
    """Size of a local view in voxels over that of the input: 96 of 256 [choice], to the nearest multiple of the patch;
    volumes have half of their slices."""
    flip: Annotated[float, Range(ge=0, le=1)] = 0.5
    """Probability that an axis of a global view is mirrored, for each axis in the plane."""
    shift: NonNegative = 0.1
    """Largest shift of a global view's intensities, over their range [choice]."""
    blur: tuple[NonNegative, NonNegative] = (0.1, 2.0)
    """Least and greatest deviation of the Gaussian, in voxels, that blurs the first global view (DINO's)."""
    gamma_range: tuple[Positive, Positive] = (0.7, 1.5)
    """Least and greatest exponent of the contrast of the second global view (nnU-Net's range)."""
    hidden: Count = 2048
    """Width of the projection's two hidden layers [SimDINO]."""
    width: Count = 256
    """d, of the features that are compared [SimDINO]."""
    eps: Positive = 0.5
    """ε of the coding rate as SimDINO's code has it, ½ log det(I + d / ε · Γ). The paper has ε² in its place, 0.25."""
    gamma: Positive | None = None
    """Weight of the coding rate: `null` is SimDINO's own (d + m) / (d · m) for m samples over all ranks, 0.035 for 32;
    the paper has 1."""
    rate_of: Literal["mean", "student"] = "mean"
    """Whose features spread: the `mean` of student and teacher [SimDINO], or the `student`'s [paper]; of the global
    views."""
    momentum: Annotated[float, Range(ge=0, le=1)] = 0.996
    """Of the teacher, at first; a cosine leads to 1 [paper]."""


TRAINING = TrainingSettings(
    epochs=300, lr=1e-3, weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=10.0, gradient_clip=3.0
)
"""300 epochs, 1e-3, 10 epochs of warm-up, a cosine [paper]; weight decay from 0.04 to 0.4, clipping at 3 [SimDINO]."""
