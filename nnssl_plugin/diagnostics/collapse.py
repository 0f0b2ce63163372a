"""Collapse of a representation: spread and effective rank of a batch of feature vectors, in float32."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread of the directions of the features: 1 for isotropic ones, 0 where all point the same way.

    √d · mean over the d dimensions of the standard deviation (with n − 1) over the batch of f / ‖f‖₂.
    Source: Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021, section 4.1, where an isotropic
    Gaussian gives 1/√d; the same measure as ``lightly.utils.debug.std_of_l2_normalized``, times √d. In very small
    batches isotropic features stay below 1 (0.8 for two), as a standard deviation of few samples does.

    Args:
        features: (B, d).

    Returns:
        () float32; NaN for a single sample, which has no spread, and for features that are not finite.
    """
    if len(features) < 2:
        return features.new_full((), math.nan, dtype=torch.float32)
    directions = F.normalize(features.float(), dim=1)
    return directions.std(0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Number of dimensions that the features use: between 1 (collapsed) and min(B, d).

    exp(−Σ p log p) with p = σ / Σσ, σ the singular values of the (uncentred) feature matrix.
    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007; as a measure of pretraining: Garrido et al.,
    "RankMe", ICML 2023.

    Args:
        features: (B, d).

    Returns:
        () float32; NaN for features that are not finite.
    """
    features = features.float()
    finite = features.isfinite().all()
    singular = torch.linalg.svdvals(features.nan_to_num(0, 0, 0))
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny)
    rank = torch.special.entr(share).sum().exp()
    return rank.where(finite, math.nan)
