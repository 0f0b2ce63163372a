"""Settings of distillation: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Literal

from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, NonNegative


@dataclass(frozen=True)
class Settings:
    """Settings of the method; all are ours."""

    teacher: str | None = None
    """File with the teacher's weights, of any kind that `nnssl_plugin inspect` names the network of; relative to the
    preprocessed dataset's folder. It must be set."""
    normalisation: Literal["file", "plan", "zscore"] = "file"
    """How intensities come to the teacher: as its `file` says that its images were normalised, as the `plan` does for
    the student, or each channel with mean 0 and standard deviation 1 over all voxels (`zscore`)."""
    stride: Count = 8
    """Voxels from one token of the teacher's map to the next: the nearest of its stages is taken, and of the student
    the stage that is nearest to that."""
    cosine_weight: NonNegative = 1.0
    """Weight of 1 − cosine of each token."""
    values_weight: NonNegative = 0.0
    """Weight of the mean square between the values, each channel standardised over the tokens of its sample."""


TRAINING = TrainingSettings(epochs=300, lr=1e-3, weight_decay=0.05, warmup_epochs=10.0)
"""AdamW, rate and length as MAE's; ours."""
