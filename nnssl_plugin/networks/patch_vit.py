"""A vision transformer over patches that serves every grid: ``nnssl_plugin.networks.patch_vit.PatchViT``.

Liu et al., M3Ret, section 3.1: one encoder for X-ray, ultrasound, video and CT, whose inputs differ in their number of
slices. Its positions are fixed sines and cosines of the patch's place (Dosovitskiy et al. 2021; in three dimensions),
so that no size of image needs weights of its own. For segmentation the tokens reach a light decoder of transposed
convolutions whose one skip connection is the image (UNETR, Hatamizadeh et al. 2022, and Primus at their simplest).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.construction import refuse_deep_supervision
from nnssl_plugin.networks.families.patch_vit import PATCH_VIT

CONVOLUTIONS = {
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d),
}
NORM = partial(nn.LayerNorm, eps=1e-6)
"""As in timm's, MAE's and DINO's vision transformers."""
LOWEST_FREQUENCY = 10000.0
"""Base of the wavelengths of the positions (Vaswani et al. 2017, section 3.5)."""
DEFAULT_PATCH = (4, 16, 16)
"""Voxels (z, y, x) of M3Ret's patches."""


class PatchViT(nn.Module):
    """Patch embedding, transformer, light decoder, in two or three dimensions.

    Args:
        input_channels: channels of the image (B, input_channels, *spatial).
        num_classes: channels of the output, at the size of the image.
        patch_size: voxels of a patch per axis, powers of two; two numbers make a network for 2D images.
        embed_dim: width of a token.
        depth: transformer blocks.
        num_heads: of each block.
        mlp_ratio: width of a block's hidden layer over that of a token.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        summary_token: whether a learned token that belongs to no patch stands before them (CLS).
        decoder_width: channels of the decoder's finest map; coarser ones have twice as many per halving, up to
            ``embed_dim``.
        deep_supervision: may be False: the network has one output.

    Raises:
        UserError: for a patch that no halving leads to, and where deep supervision is asked for.
    """

    key_to_encoder = PATCH_VIT.encoder
    key_to_stem = PATCH_VIT.stem
    keys_to_in_proj = PATCH_VIT.image_layers

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        patch_size: Sequence[int] = DEFAULT_PATCH,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        summary_token: bool = True,
        decoder_width: int = 32,
        deep_supervision: bool = False,
    ):
        super().__init__()
        _check(patch_size, deep_supervision)
        self.encoder = PatchEncoder(
            input_channels,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            drop_path_rate=drop_path_rate,
            summary_token=summary_token,
        )
        self.decoder = LightDecoder(input_channels, patch_size, embed_dim, decoder_width)
        self.head = CONVOLUTIONS[len(patch_size)][0](decoder_width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, *spatial) of an image (B, input_channels, *spatial)."""
        return self.head(self.decoder(self.encoder.map(x), x))


class PatchEncoder(nn.Module):
    """Patches become tokens, which attend to one another; arguments as of :class:`PatchViT`."""

    def __init__(
        self,
        input_channels: int,
        patch_size: Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        drop_path_rate: float,
        summary_token: bool,
    ):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.embed_dim = embed_dim
        self.patch_embed = nn.Module()
        convolution = CONVOLUTIONS[len(patch_size)][0]
        self.patch_embed.proj = convolution(input_channels, embed_dim, self.patch_size, stride=self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if summary_token else None
        rates = [drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=NORM) for rate in rates
        )
        self.norm = NORM(embed_dim)
        _initialise(self.blocks)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """The summary (B, embed_dim), where there is such a token, and the tokens (B, N, embed_dim) of the patches.

        Args:
            x: image (B, C, *spatial).
            keep: (B, K) long, the patches that are encoded, as if the others did not exist; ``None`` for all.
        """
        embedded = self.patch_embed.proj(x)
        tokens = embedded.flatten(2).mT
        tokens = tokens + positions(embedded.shape[2:], self.embed_dim, x.device).to(tokens.dtype)
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, self.embed_dim))
        if self.cls_token is None:
            return None, self._transformed(tokens)
        tokens = self._transformed(torch.cat((self.cls_token.to(tokens.dtype).expand(len(x), -1, -1), tokens), 1))
        return tokens[:, 0], tokens[:, 1:]

    def map(self, x: Tensor) -> Tensor:
        """The tokens as a map (B, embed_dim, *spatial / patch_size)."""
        return self.as_map(self(x)[1], x)

    def as_map(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, N, embed_dim) of an image as a map (B, embed_dim, *spatial / patch_size)."""
        grid = [size // patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        return tokens.mT.unflatten(2, grid)

    def fresh_blocks(self, depth: int) -> "TokenBlocks":
        """Transformer blocks of this width, with as many heads."""
        return TokenBlocks(self.embed_dim, depth, self.blocks[0].attn.num_heads)

    def _transformed(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class TokenBlocks(nn.Module):
    """Transformer blocks over the tokens of a whole grid, which get their fixed positions first.

    Args:
        width: C, of a token.
        depth: blocks.
        num_heads: of each.
        mlp_ratio: width of a block's hidden layer over C.
    """

    def __init__(self, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=NORM) for _ in range(depth)
        )
        self.norm = NORM(width)
        _initialise(self.blocks)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, N, C) from as many; ``grid`` says how they lie, N is its product."""
        tokens = tokens + positions(grid, tokens.shape[2], tokens.device).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class LightDecoder(nn.Module):
    """Transposed convolutions from the tokens to the image's size, then one convolution that also reads the image."""

    def __init__(self, input_channels: int, patch_size: Sequence[int], embed_dim: int, width: int):
        super().__init__()
        convolution, transposed, norm = CONVOLUTIONS[len(patch_size)]
        steps = halvings(patch_size)
        self.width = width
        widths = [min(embed_dim, width * 2 ** (len(steps) - step)) for step in range(1, len(steps) + 1)]
        self.steps = nn.ModuleList(
            nn.Sequential(transposed(before, after, stride, stride), norm(after, affine=True), nn.LeakyReLU())
            for before, after, stride in zip([embed_dim, *widths[:-1]], widths, steps, strict=True)
        )
        self.image = nn.Sequential(
            convolution(input_channels, width, 3, padding=1), norm(width, affine=True), nn.LeakyReLU()
        )
        self.fuse = nn.Sequential(convolution(2 * width, width, 3, padding=1), norm(width, affine=True), nn.LeakyReLU())

    def forward(self, tokens: Tensor, image: Tensor | None) -> Tensor:
        """The finest map (B, width, *spatial).

        Args:
            tokens: (B, embed_dim, *grid).
            image: (B, C, *spatial), the skip connection; ``None`` leaves it zero.
        """
        for step in self.steps:
            tokens = step(tokens)
        return self.fuse(torch.cat((tokens, self._skip(tokens, image)), 1))

    def _skip(self, finest: Tensor, image: Tensor | None) -> Tensor:
        """The image's part; without it the layer still gets zero gradients, which several ranks wait for."""
        if image is not None:
            return self.image(image)
        return torch.zeros_like(finest) + 0 * sum(parameter.sum() for parameter in self.image.parameters())


def positions(grid: Sequence[int], width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed positions (1, N, width) of a grid's tokens: sines and cosines of the place along z, y and x.

    Each axis has 2 · ⌊width / 6⌋ numbers, the rest are 0. A grid of two axes lies in the plane z = 0, so that a 2D
    network and the 3D one that it came from give a patch the same position.
    """
    frequencies = width // 6
    if frequencies == 0:
        raise UserError(f"A token of {width} numbers cannot hold three positions.", "Take an embed_dim of 6 or more.")
    grid = (1,) * (3 - len(grid)) + tuple(grid)
    rates = LOWEST_FREQUENCY ** -(torch.arange(frequencies, device=device) / frequencies)
    axes = torch.meshgrid(*(torch.arange(count, device=device, dtype=torch.float32) for count in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in axes]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))[None]


def halvings(patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Strides of the decoder's steps, coarse to fine, whose product is the patch: 2 along each axis that still needs
    it, so that short axes grow in the last steps."""
    times = [int(math.log2(size)) for size in patch_size]
    return [tuple(2 if count >= left else 1 for count in times) for left in range(max(times), 0, -1)]


def _initialise(blocks: nn.Module) -> None:
    """Weights of a transformer's linear layers, truncated normal with a deviation of 0.02."""
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check(patch_size: Sequence[int], deep_supervision: bool) -> None:
    if len(patch_size) not in CONVOLUTIONS or any(size < 1 or size & (size - 1) for size in patch_size):
        raise UserError(
            f"The patch {list(patch_size)} of PatchViT is not two or three powers of two, one per axis.",
            "Set it in the plan, for example patch_size: [4, 16, 16].",
        )
    refuse_deep_supervision("PatchViT", deep_supervision)
