"""SimDINO's projection, which is dropped after pretraining."""

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """SimDINO's head: three layers, then unit length; no prototypes, no centring, no temperature."""

    def __init__(self, width: int, hidden: int, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) → (B, dim), float32, of length 1."""
        return F.normalize(self.layers(features).float(), dim=-1)
