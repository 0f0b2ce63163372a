"""Settings of MAE: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, Range


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of He et al. are marked [paper], of MIC-DKFZ/nnssl [nnssl]."""

    ratio: Annotated[float, Range(gt=0, lt=1)] = 0.75
    """Share of the blocks that is masked, of n blocks floor(n · ratio) [paper, nnssl]. nnFoundation's transformer has
    0.8."""
    block: Count | None = None
    """Edge of a block in voxels on every axis; `null`: 16 [nnssl at 160³], in small patches the largest power of two of
    which 4 fit on every axis, and never less than 4. In Primus the blocks are its own patches, whatever stands here."""
    loss_on: Literal["masked", "all"] = "masked"
    """Voxels whose error counts: the `masked` ones [paper, nnssl], or `all`."""
    decoder_blocks: Count = 2
    """In Primus: transformer blocks that spread what the visible patches say over the mask tokens, before the network's
    own up-projection; they are dropped after pretraining (8 [paper])."""


TRAINING = TrainingSettings(epochs=300, lr=1e-3, weight_decay=0.05, warmup_epochs=10.0)
"""AdamW with a weight decay of 0.05, warm-up and a cosine [paper]; the rate and the length are ours."""
