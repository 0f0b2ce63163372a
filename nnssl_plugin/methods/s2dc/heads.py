"""Projection heads of S2DC: the public code's 768→2048→2048→512 perceptron, normalised without coupling samples."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TokenNorm(nn.Module):
    """Normalise each feature over the tokens of its sample: mean 0, variance 1; nothing learned.

    It takes the place of the public code's BatchNorm without affine part and running statistics, which the code calls
    once per sample too (``s2dc_head.py``); over a whole batch it would make samples depend on each other.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C), statistics in float32."""
        tokens = tokens.float()
        centred = tokens - tokens.mean(1, keepdim=True)  # four times as fast on a CPU as torch.var_mean
        return centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class RunningNorm(nn.Module):
    """Standardise each feature by the mean and deviation that it had in earlier steps; nothing learned.

    Behind the instance normalisations of a planned network the pooled features of all images are nearly the same
    vector, and a contrastive term over them collapses. The public code's BatchNorm takes that vector off, by the
    statistics of the batch; those of earlier steps keep samples independent of each other.

    Args:
        width: C.
        momentum: share of the statistics that is kept in a step.
    """

    def __init__(self, width: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) → (..., C) in float32; unchanged before the first :meth:`update`."""
        features = features.float()
        weight = self.weight.clamp(min=torch.finfo(torch.float32).tiny)
        mean = self.mean / weight
        variance = (self.square / weight - mean.square()).clamp(min=0)
        return torch.where(self.weight > 0, (features - mean) * (variance + 1e-6).rsqrt(), features)

    @torch.no_grad()
    def update(self, features: Tensor, applied: Tensor) -> None:
        """Take in the features (B, C) of a step of all ranks; nothing changes where ``applied`` () is False."""
        share = (1 - self.momentum) * applied
        features = torch.where(applied, features.float(), 0.0)
        for kept, new in (
            (self.mean, features.mean(0)),
            (self.square, features.square().mean(0)),
            (self.weight, torch.ones_like(self.weight)),
        ):
            kept.mul_(1 - share).add_(share * new)


def token_head(width: int, hidden: int, dim: int) -> nn.Sequential:
    """(B, N, width) → (B, N, dim)."""
    return _perceptron(width, hidden, dim, TokenNorm)


def global_head(width: int, hidden: int, dim: int) -> nn.Sequential:
    """(B, width) → (B, dim); LayerNorm, as one pooled feature per sample has no tokens to normalise over."""
    return _perceptron(width, hidden, dim, lambda: nn.LayerNorm(hidden, elementwise_affine=False))


def _perceptron(width: int, hidden: int, dim: int, norm: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        norm(),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        norm(),
        nn.ReLU(),
        nn.Linear(hidden, dim),
    )
