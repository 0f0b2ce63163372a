"""Settings of MAE with aligned contrast: the ``pretraining`` block of a plan, its ``method`` part :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.mae.settings import TRAINING as OF_MAE
from nnssl_plugin.methods.mae.settings import Settings as MAESettings
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, Share


@dataclass(frozen=True)
class Settings(MAESettings):
    """Those of MAE, and of the contrast. The numbers are ours: Vaish et al. were read for the idea alone."""

    overlap: Annotated[float, Range(gt=0, le=1)] = 0.4
    """Share of a side, along every axis, that two crops of a case have in common at least."""
    points: Count = 4
    """Points per axis of the overlap at which both crops are read: 4³ in 3D."""
    cells: Count = 4
    """Tokens per axis that the map from which the points are read has at least; the coarsest such stage is taken.
    Primus has one stage."""
    dim: Count = 128
    """Length of the projected features that are compared."""
    temperature: Positive = 0.1
    """τ of NT-Xent."""
    early_temperature: Positive = 0.2
    """τ when the contrast sets in; it falls linearly to `temperature`."""
    contrast_weight: NonNegative = 0.1
    """Weight of the contrast, beside 1 for the reconstruction."""
    contrast_from: Share = 0.1
    """Fraction of the run after which the contrast counts; before, its weight is 0."""
    settled_from: Share = 0.2
    """Fraction of the run after which τ stays at `temperature`."""

    def __post_init__(self) -> None:
        if self.settled_from < self.contrast_from:
            raise UserError(
                f"The temperature of MAE's contrast settles at {self.settled_from:g} of the run, before the contrast "
                f"sets in at {self.contrast_from:g}.",
                f"nnssl_plugin plan -d ID -p PLANS -n NAME --set method.settled_from={self.contrast_from:g}",
            )


TRAINING = OF_MAE
"""As MAE's, with which it is compared."""
