"""Settings of BrainMVP's fine-tuning: the part ``method`` of a plan's ``finetuning`` block."""

from dataclasses import dataclass
from typing import Annotated

from nnssl_plugin.settings import Count, NonNegative, Range, Share


@dataclass(frozen=True)
class Settings:
    """How the two copies of an image differ, and how much alike their features shall be."""

    most_replaced: Annotated[int, Range(ge=0)] = 3
    """Most modalities that a template replaces in a copy; their number is drawn evenly from 0 to this (its code's
    ``num_mix``), and one that the case really has always stays. Not read where images have one channel."""
    masked: Share = 0.5
    """Where images have one channel: share of the voxels that its template replaces, by algorithm 1. Ours; the
    pretraining's 0.875 leaves a supervised loss little to see."""
    block: Count = 8
    """Edge of a masked cube in voxels, where images have one channel (r of algorithm 1)."""
    consistency: NonNegative = 0.1
    """Weight of the mean squared difference of the encoder's deepest features of both copies (eq. 8)."""
