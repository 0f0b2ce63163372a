"""Contrastive losses, soft assignments between two sets of features, and a queue of negatives.

Similarities are dot products: cosines where the features are unit vectors, which these functions do not make of them.
Everything is computed in float32 at least, with autocast off. Nothing here waits for the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, *, temperature: float, known: Tensor | None = None
) -> Tensor:
    """Cross entropy of finding each query's positive among the negatives (S2DC, Eq. 1; He et al., MoCo, CVPR 2020).

    −log exp(q·p/τ) / (exp(q·p/τ) + Σ_k exp(q·n_k/τ)), mean over the queries. The paper's Eq. 1 prints τ outside the
    exponential, where it would cancel; this is MoCo's form.

    Args:
        query: (B, D).
        positive: (B, D), one for each query.
        negatives: (K, D), shared by the queries; K may be 0.
        temperature: τ > 0.
        known: (K,) bool, the negatives that count; ``None`` for all.

    Returns:
        () at least 0; log(1 + K) if all similarities are equal.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    _check(temperature)
    with torch.autocast(query.device.type, enabled=False):
        query, positive, negatives = _full_precision(query, positive, negatives)
        own = (query * positive).sum(-1, keepdim=True)
        others = query @ negatives.T
        if known is not None:
            others = others.masked_fill(~known, -math.inf)
        logits = torch.cat((own, others), 1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).mean()


def symmetric_info_nce(first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """InfoNCE between two views of a batch, where the other samples are the negatives, mean of both directions.

    Source: Radford et al., CLIP, ICML 2021; BrainMVP, Eqs. 4 and 5, whose negatives have the same modality.

    Args:
        first: (B, D).
        second: (B, D), in the same order.
        temperature: τ > 0.
        groups: (B,) whole numbers: the negatives of a sample are those of its own group, and a sample whose group is
            below 0 takes no part. ``None``: all are one group.

    Returns:
        () at least 0; log B if all similarities are equal, 0 without signal where each is alone in its group.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    _check(temperature)
    with torch.autocast(first.device.type, enabled=False):
        first, second = _full_precision(first, second)
        if groups is None:
            return -log_dual_softmax(first @ second.T, temperature).diagonal().mean() / 2
        logits = (first @ second.T / temperature).masked_fill(groups[:, None] != groups, -math.inf)
        both = logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
        counted = groups >= 0
        return torch.where(counted, both, 0.0).sum() / (2 * counted.sum().clamp(min=1))


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, apart: Tensor | None = None) -> Tensor:
    """NT-Xent: each feature has to find its partner in the other view among all features of both views.

    −log exp(z_i·z_j/τ) / (exp(z_i·z_j/τ) + Σ_k exp(z_i·z_k/τ)), mean over the 2N features. Source: Chen et al., SimCLR,
    ICML 2020, Eq. 1.

    Args:
        first: (N, D).
        second: (N, D), in the same order.
        temperature: τ > 0.
        apart: (N, N) bool, which of the N are negatives of which, in both views alike; symmetric, the diagonal does not
            count. ``None``: all others.

    Returns:
        () at least 0; log(1 + 2M) if all similarities are equal and each has M negatives in a view, 0 without any.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    _check(temperature)
    with torch.autocast(first.device.type, enabled=False):
        both = torch.cat(_full_precision(first, second))
        number = len(first)
        same = torch.eye(number, dtype=torch.bool, device=both.device)
        negative = ~same if apart is None else apart & ~same
        logits = both @ both.T / temperature
        partner = (logits.diagonal(number), logits.diagonal(-number))
        counted = torch.cat((torch.cat((negative, negative | same), 1), torch.cat((negative | same, negative), 1)))
        return (logits.masked_fill(~counted, -math.inf).logsumexp(1) - torch.cat(partner)).mean()


def log_dual_softmax(similarity: Tensor, temperature: float) -> Tensor:
    """Logarithm of :func:`dual_softmax` (..., N, M), finite also where the product underflows: what losses use."""
    _check(temperature)
    with torch.autocast(similarity.device.type, enabled=False):
        logits = _full_precision(similarity)[0] / temperature
        return logits.log_softmax(-1) + logits.log_softmax(-2)


def dual_softmax(similarity: Tensor, temperature: float) -> Tensor:
    """Soft assignment of rows to columns: softmax over the row times softmax over the column (S2DC, Eq. 4).

    The paper names no temperature; without one, cosines of 144 tokens cannot bring the loss below 7.95. This is the
    form of Sun et al., LoFTR, CVPR 2021, section 3.3.

    Args:
        similarity: (..., N, M).
        temperature: τ > 0 that divides the similarities.

    Returns:
        (..., N, M) in [0, 1], with sums of rows and columns of at most 1; 1 / (N·M) for equal similarities.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    return log_dual_softmax(similarity, temperature).exp()


def sinkhorn_with_dustbin(similarity: Tensor, *, dustbin: float, iterations: int) -> Tensor:
    """Logarithm of the entropic transport plan whose last row and column take what has no partner.

    Each row and each column has mass 1, the dustbins enough for all of the other side: rows sum to (1, …, 1, M),
    columns to (1, …, 1, N), the columns exactly, the rows in the limit. Sinkhorn's iterations on the logarithms.
    Source: Sarlin et al., SuperGlue, CVPR 2020, section 3.2, whose plan S2DC's "Sinkhorn" option takes.

    Args:
        similarity: (B, N, M) logits: divide by a temperature first; raw cosines hardly tell two tokens apart.
        dustbin: logit of having no partner.
        iterations: at least 1. They cost time, not memory: autograd keeps two vectors of each.

    Returns:
        (B, N+1, M+1) log plan.

    Raises:
        ValueError: for iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    with torch.autocast(similarity.device.type, enabled=False):
        logits = F.pad(_full_precision(similarity)[0], (0, 1, 0, 1), value=dustbin)
        rows, columns = similarity.shape[-2:]
        row_mass = F.pad(logits.new_zeros(rows), (0, 1), value=math.log(columns))[:, None]
        column_mass = F.pad(logits.new_zeros(columns), (0, 1), value=math.log(rows))[None]
        g = torch.zeros_like(logits[..., :1, :])
        for _ in range(iterations):
            f = row_mass - _ShiftedLogSumExp.apply(logits, g, -1)
            g = column_mass - _ShiftedLogSumExp.apply(logits, f, -2)
        return logits + f + g


class FeatureQueue(nn.Module):
    """The latest features, first in, first out: the negatives of a contrastive loss (MoCo).

    State is in buffers, so that a run resumes with the same negatives. It starts with random unit vectors, which
    ``known`` tells from features: as negatives they would reward a network that maps every image to one direction, far
    from all of them. Fed with the features gathered from all ranks, all ranks hold the same queue.

    Args:
        size: number of features kept.
        dim: length of a feature.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        """Row of the oldest feature, which is replaced next."""
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        """Number of rows that hold a feature."""

    @property
    def known(self) -> Tensor:
        """(size,) bool, False for rows that still hold what they started with."""
        return torch.arange(len(self.features), device=self.filled.device) < self.filled

    @torch.no_grad()
    def enqueue(self, features: Tensor, applied: Tensor) -> None:
        """Replace the oldest features by the unit vectors along these.

        Args:
            features: (B, dim) of all ranks, oldest first; only the last ``size`` of a larger batch are kept.
            applied: () bool on the device; where it is False, nothing changes.
        """
        size, number = len(self.features), len(features)
        newest = F.normalize(features[-size:].to(self.features.dtype), dim=1)
        skipped = number - len(newest)
        places = (self.pointer + skipped + torch.arange(len(newest), device=newest.device)) % size
        self.features.index_copy_(0, places, torch.where(applied, newest, self.features[places]))
        self.pointer.add_(number * applied).remainder_(size)
        self.filled.add_(number * applied).clamp_(max=size)


class _ShiftedLogSumExp(torch.autograd.Function):
    """log Σ exp(logits + shift) over one dimension, which is kept; saves no matrix of its own for the backward."""

    @staticmethod
    def forward(ctx, logits: Tensor, shift: Tensor, dim: int) -> Tensor:
        total = torch.logsumexp(logits + shift, dim, keepdim=True)
        ctx.save_for_backward(logits, shift, total)
        ctx.dim = dim
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, shift, total = ctx.saved_tensors
        share = (logits + shift - total).exp() * gradient
        return share, share.sum(-1 if ctx.dim == -2 else -2, keepdim=True), None


def _full_precision(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.to(torch.promote_types(value.dtype, torch.float32)) for value in values)


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
