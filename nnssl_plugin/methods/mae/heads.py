"""The light decoder of MAE over tokens, which is dropped after pretraining."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TokenDecoder(nn.Module):
    """Puts encoded tokens into the whole grid, a learned mask token in every other place, and lets all attend.

    Args:
        blocks: transformer from tokens (B, N, C) and the counts of their grid to as many.
        width: C.
    """

    def __init__(self, blocks: nn.Module, width: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.blocks = blocks

    def forward(self, tokens: Tensor, keep: Tensor, grid: Sequence[int]) -> Tensor:
        """The map (B, C, *grid) of all patches.

        Args:
            tokens: (B, K, C), the encoded ones.
            keep: (B, K) long, their places in the grid.
            grid: tokens per axis; N is their product.
        """
        return self.blocks(self.restored(tokens, keep, math.prod(grid)), grid).mT.unflatten(2, tuple(grid))

    def restored(self, tokens: Tensor, keep: Tensor, total: int) -> Tensor:
        """The full sequence (B, N, C) before it is decoded."""
        blank = self.mask_token.to(tokens.dtype).expand(len(tokens), total, -1)
        return blank.scatter(1, keep[:, :, None].expand_as(tokens), tokens)
