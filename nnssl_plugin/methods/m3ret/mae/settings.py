"""Settings of M3Ret's MAE: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.methods.m3ret.settings import InputSettings
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, Range


@dataclass(frozen=True)
class Settings(InputSettings):
    """Settings of M3Ret's masked autoencoding. [paper] equation 1, [MAE] He et al. and their code."""

    ratio: Annotated[float, Range(gt=0, lt=1)] = 0.75
    """Share of the patches that is masked, of N patches floor(N · ratio) [paper]."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the numbers of a patch: the `mean` [MAE], for which the rate is meant, or the `sum` [paper], up to 3,072
    times as much."""
    normalised_patches: bool = False
    """Whether each patch is to be restored with mean 0 and variance 1 ([MAE]'s recipe; patches of air have no
    variance)."""
    decoder_width: Count = 512
    """Of the decoder's tokens [MAE]; a multiple of `decoder_heads`."""
    decoder_blocks: Count = 8
    """Transformer blocks of the decoder [MAE], which is dropped after pretraining."""
    decoder_heads: Count = 16
    """[MAE]"""


TRAINING = TrainingSettings(epochs=300, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=10.0)
"""300 epochs, 1e-3, 10 epochs of warm-up, a cosine [paper]; AdamW with betas of 0.9 and 0.95, and 0.05 [MAE]."""
