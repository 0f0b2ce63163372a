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
        variance, mean = torch.var_mean(tokens, 1, correction=0, keepdim=True)
        return (tokens - mean) * (variance + 1e-5).rsqrt()


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
