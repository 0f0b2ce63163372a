"""The small decoder of M3Ret's MAE, from encoded tokens to the voxels of every patch; dropped after pretraining."""

import math
from collections.abc import Sequence

import torch
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
