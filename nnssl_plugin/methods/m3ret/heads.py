"""What M3Ret trains beside the encoder, and drops: MAE's decoder over tokens, SimDINO's projection."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.networks.patch_vit import TokenBlocks


class PatchDecoder(nn.Module):
    """Encoded tokens and mask tokens in their places, attended to, and a linear layer to the voxels of each patch.

    Args:
        width: C, of the encoder's tokens.
        decoder_width: of the decoder's own.
        blocks: transformer blocks.
        heads: of each block.
        voxels: numbers of a patch, P = channels · its voxels.
    """

    def __init__(self, width: int, decoder_width: int, blocks: int, heads: int, voxels: int):
        super().__init__()
        self.embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.blocks = TokenBlocks(decoder_width, blocks, heads)
        self.predict = nn.Linear(decoder_width, voxels)

    def forward(self, tokens: Tensor, keep: Tensor, grid: Sequence[int]) -> Tensor:
        """The patches (B, N, P) of the whole grid.

        Args:
            tokens: (B, K, C), the encoded ones.
            keep: (B, K) long, their places in the grid.
            grid: patches per axis; N is their product.
        """
        tokens = self.embed(tokens)
        blank = self.mask_token.to(tokens.dtype).expand(len(tokens), math.prod(grid), -1)
        whole = blank.scatter(1, keep[:, :, None].expand_as(tokens), tokens)
        return self.predict(self.blocks(whole, grid))


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
