"""Correspondence of the patches of two views, and the losses on it: Eqs. 2 to 8 of S2DC.

Pan et al., "Structure-aware Semantic Discrepancy and Consistency for 3D Medical Image Self-supervised Learning".
"""

import torch
from torch import Tensor

from nnssl_plugin.networks.token_grid import TokenGrid
from nnssl_plugin.transforms.affine import invert_affine, transform_points

LEAST_VISIBLE = 0.5
"""Share of what the image holds of a patch that must lie in the field of view."""


def patch_correspondence(affine: Tensor, tokens: TokenGrid) -> Tensor:
    """M_gt of Eqs. 2 and 3: patches whose centres fall into each other, there and back.

    H(c_i) − c_j and H⁻¹(c_j) − c_i must lie in [−½, ½) patches on every axis. The interval is half-open, so that a
    centre falls into one patch only and M_gt is a partial permutation; the paper's closed one matches two at a tie.

    Args:
        affine: H, (B, d, d+1), from points of the first view to points of the second, in voxels.
        tokens: where the tokens lie in both views; the cell of each is a patch to the paper.

    Returns:
        (B, N, N) bool: patch i of the first view and j of the second; row and column sums are at most 1.
    """
    centres = tokens.centres(affine.device).to(affine.dtype).expand(len(affine), -1, -1)
    patches = torch.arange(centres.shape[1], device=affine.device)
    forward = tokens.token_at(transform_points(centres, affine))
    back = tokens.token_at(transform_points(centres, invert_affine(affine)))
    return (forward[:, :, None] == patches) & (back[:, None, :] == patches[:, None])


def visible_patches(image: Tensor, valid: Tensor, tokens: TokenGrid) -> Tensor:
    """Patches that show something: half of what the image holds of them lies in the field of view, and not all of it is
    padding.

    Args:
        image: (B, C, *spatial), 0 where nothing was imaged.
        valid: (B, 1, *spatial) bool, False outside the field of view.
        tokens: where the tokens lie in the image.

    Returns:
        (B, N) bool.
    """
    whole = torch.ones_like(valid)
    valid, not_empty, whole = tokens.sums(torch.cat((valid, image.ne(0).any(1, keepdim=True), whole), 1)).unbind(1)
    return (valid >= LEAST_VISIBLE * whole) & (not_empty > 0)


def patch_to_patch_loss(log_assignment: Tensor, matches: Tensor) -> Tensor:
    """L_p2p of Eq. 5, −(1/|M_gt|) Σ M_gt log M̂, of each sample.

    |M_gt| is the sample's own, so that a sample with few matches weighs as much as any; one without matches gives 0.

    Args:
        log_assignment: log M̂, (B, N, M).
        matches: M_gt, (B, N, M) bool, at most one per row.

    Returns:
        (B,).
    """
    matched, partner = _partners(matches)
    return -_of_pairs(log_assignment, matched, partner).sum(1) / matched.sum(1).clamp(min=1)


def non_match_loss(log_assignment: Tensor, matches: Tensor) -> Tensor:
    """Mean of −log(1 − M̂) over the pairs that do not correspond, of each sample (B,): the public code's addition."""
    apart = -torch.log1p(-log_assignment.clamp(max=-1e-6).exp())
    return torch.where(matches, 0.0, apart).sum((1, 2)) / (~matches).sum((1, 2)).clamp(min=1)


def sharpe_ratio(similarity: Tensor) -> Tensor:
    """Eq. 6, (max D − mean D) / σ(D) of every row: high for one peak, low for several.

    σ is the standard deviation, as in a Sharpe ratio and in the public code: a variance, as the paper calls it, would
    make the ratio depend on the scale of the similarities.

    Args:
        similarity: (..., N, M), the rows D_n.

    Returns:
        (..., N); 0 for a constant row.
    """
    centred = similarity.amax(-1) - similarity.mean(-1)
    variance = similarity.var(-1, correction=int(similarity.shape[-1] > 1))
    return centred * (variance + 1e-8).rsqrt()


def patch_weights(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """½ softmax(sr)_n (B, N) and ½ softmax(sr')_m (B, M) of Eq. 7, whose sum is the weight of a pair, for similarities
    (B, N, M) of the two views' patches."""
    first = sharpe_ratio(similarity).softmax(-1)
    second = sharpe_ratio(similarity.mT).softmax(-1)
    return first / 2, second / 2


def patch_to_structure_loss(log_assignment: Tensor, matches: Tensor, similarity: Tensor) -> Tensor:
    """L_p2s of Eqs. 7 and 8, of each sample: the losses of the matches, weighted by how single their peaks are.

    Not divided by N² as Eq. 8 is: the weights sum to 1 already, and L_p2s would be 10⁻⁴ of L_p2p.

    Args:
        log_assignment: log M̂, (B, N, M).
        matches: M_gt, (B, N, M) bool, at most one per row.
        similarity: (B, N, M) of patches; detached, it leaves the weights without gradient.

    Returns:
        (B,); 0 for a sample without matches.
    """
    matched, partner = _partners(matches)
    first, second = patch_weights(similarity)
    weights = first + second.gather(1, partner)
    return -(weights * _of_pairs(log_assignment, matched, partner)).sum(1)


def _partners(matches: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of M_gt (B, N, M) have a match, (B, N) bool, and its column, (B, N) int64; 0 for the others."""
    return matches.any(2), matches.to(torch.uint8).argmax(2)


def _of_pairs(values: Tensor, matched: Tensor, partner: Tensor) -> Tensor:
    """Values (B, N, M) of the matched pairs, (B, N); 0 for the rows that have none."""
    return torch.where(matched, values.gather(2, partner[:, :, None]).squeeze(2), 0.0)
