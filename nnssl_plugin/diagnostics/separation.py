"""Separation of token features by label: the label of each token, cosine gap, and silhouette.

Pan et al., "Structure-aware Semantic Discrepancy and Consistency for 3D Medical Image Self-supervised Learning",
section 4.3 and figure 5. Measures for diagnostics and evaluation, not losses: tokens with a label below 0, or with
features that are not finite, count nowhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

MOST_TOKENS = 4000
"""Tokens that the silhouette compares pair by pair; of more, a fixed random choice."""


def token_labels(segmentation: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
    """The label that most voxels around each token's centre have; of equally frequent ones the smallest.

    Args:
        segmentation: (B, *size) integers; -1 outside the case.
        sums: of maps (B, 1, *size) over the cells of the N tokens, (B, 1, N): ``TokenGrid.sums``.

    Returns:
        (B, N) int64.
    """
    values = segmentation.unique()
    shares = [sums((segmentation == value).float()[:, None]) for value in values]
    return values[torch.cat(shares, 1).argmax(1)].long()


def cosine_gap(tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine of pairs of tokens with one label minus that of pairs with different labels, in [-2, 2].

    Args:
        tokens: (N, D) features, of any length.
        labels: (N,) integers.

    Returns:
        () float; NaN where there is no pair of one of the two kinds.
    """
    known = _known(tokens, labels).float()
    unit = functional.normalize(tokens.float().nan_to_num(0, 0, 0), dim=1) * known[:, None]
    values, index = labels.unique(return_inverse=True)
    members = functional.one_hot(index, len(values)).float() * known[:, None]
    sums, counts, own = members.T @ unit, members.sum(0), unit.square().sum()
    # over ordered pairs of different tokens: the square of a sum less the products of tokens with themselves
    same, same_pairs = sums.square().sum() - own, counts @ (counts - 1)
    every, every_pair = sums.sum(0).square().sum() - own, counts.sum() * (counts.sum() - 1)
    return same / same_pairs - (every - same) / (every_pair - same_pairs)


def silhouette(tokens: Tensor, labels: Tensor) -> float:
    """Mean silhouette of the tokens under the cosine distance, in [-1, 1] (Rousseeuw 1987; figure 5 of the paper).

    Args:
        tokens: (N, D) features; more than :data:`MOST_TOKENS` are sampled, always the same ones.
        labels: (N,) integers.

    Returns:
        NaN where fewer than two labels are left, or no label has two tokens.
    """
    from sklearn.metrics import silhouette_score

    known = _known(tokens, labels)
    features = functional.normalize(tokens[known].float(), dim=1).cpu()
    kept = labels[known].cpu()
    if len(kept) > MOST_TOKENS:
        chosen = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:MOST_TOKENS]
        features, kept = features[chosen], kept[chosen]
    if not 2 <= len(kept.unique()) < len(kept):
        return float("nan")
    return float(silhouette_score(features.numpy(), kept.numpy(), metric="cosine"))


def _known(tokens: Tensor, labels: Tensor) -> Tensor:
    """Tokens (N,) that count."""
    return (labels >= 0) & tokens.isfinite().all(1)
