"""Settings of BrainMVP: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, Share


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of the paper are marked [paper], of its public code [code]."""

    ratio: Annotated[float, Range(gt=0, lt=1)] = 0.875
    """p*, share of the voxels that another image replaces [paper] (0.8 [code])."""
    block: Count = 8
    """r, edge of a replaced cube in voxels [paper]."""
    masking: Literal["random", "grid"] = "random"
    """`random`: cubes around random voxels, which may overlap, until the share is reached [paper, Algorithm 1];
    `grid`: whole blocks of a regular grid, exactly that share of them [code]."""
    template_weight: NonNegative = 1.0
    """λ_MD, factor of the distillation, beside 1 for the cross-modal reconstruction [paper] (10 [code])."""
    contrast_weight: NonNegative = 1.0
    """λ_CL, factor of the contrast once it has set in [paper]."""
    contrast_from: Share = 0.667
    """Fraction of the run after which the contrast counts and the cases of a step show one modality where they can:
    epoch 1000 of 1500 [paper]."""
    temperature: Positive = 0.1
    """τ of the contrast; not given in the paper, 1 in its code, where 3 cases can move it from 1.10 to 0.37 alone."""
    features: Literal["flat", "pooled"] = "flat"
    """What of the encoder's last map the contrast compares: all of its values [code], or their mean over the places."""
    template_lr: Positive = 3e-3
    """Largest learning rate of the templates, on the same schedule as the network's. A value moves by about this much
    in a step in which it is replaced, so a short run needs a larger one (3e-4, the network's [paper])."""
    template_decay: NonNegative = 0.0
    """Weight decay of the templates [1e-5, the network's, paper]. In a run of n steps it leaves about
    exp(-n · `template_lr` · `template_decay` / 2) of what the first steps put into voxels that no later gradient
    reaches."""
    template_size: tuple[Count, Count, Count] | None = None
    """Size of the templates in voxels along the plan's axes; `null`: the largest preprocessed case."""
    template_warmup: Share = 0.0
    """Fraction of the run in which the template stands in for the other modality, too (0.2 [code])."""
    template_view: Literal["raw", "minmax"] = "raw"
    """How a template is shown to the network: as it is, in the intensities of the plan, or scaled to [0, 1] by its
    smallest and largest value [code], for images normalised to [0, 1]."""


TRAINING = TrainingSettings(epochs=300, lr=3e-4, weight_decay=1e-5)
"""AdamW, learning rate, cosine and weight decay [paper]; the length is ours (1500 epochs [paper])."""
