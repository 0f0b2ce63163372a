"""Primus of dynamic_network_architectures (Wald et al. 2025): a patch embedding, a transformer, an up-projection."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import Family, Parts
from nnssl_plugin.networks.receptive_fields import chain


class PrimusReader:
    """The tokens are the one stage of features, a map at the stride of the patch embedding. There are no skips."""

    dimensions = 3
    encoder_prefixes = ("eva.", "down_projection.", "register_tokens")

    def __init__(self, network: nn.Module):
        self.network = network
        self.channels = (network.embed_dim,)
        sampling = chain(_embedding(network.down_projection), self.dimensions)
        self.strides, self.offsets = (sampling.stride,), (sampling.offset,)
        last = len(network.up_projection.decode) - 1  # it gives the classes
        self.prefixes = (
            "down_projection.",
            "eva.",
            "register_tokens",
            *(f"up_projection.decode.{stage}." for stage in range(last)),
        )
        self.head_prefixes = (f"up_projection.decode.{last}.",)

    @property
    def planned_grid(self) -> tuple[int, ...] | None:
        """That of the rotary embedding."""
        grid = getattr(getattr(self.network.eva, "rope", None), "feat_shape", None)
        return None if grid is None else tuple(int(size) for size in grid)

    def features(self, x: Tensor) -> list[Tensor]:
        """The tokens as one map (B, embed_dim, *spatial / stride).

        Raises:
            UserError: for an image of another size than the network was built for.
        """
        tokens, grid = self._embedded(x)
        tokens, kept = self.network.eva(tokens)
        tokens, _ = self.network.restore_full_sequence(tokens[:, self._registers :], kept, grid.numel())
        return [tokens.transpose(1, 2).unflatten(2, grid)]

    def on_bottleneck(self, see: Callable[[Tensor], None]) -> None:
        """Let ``see`` have the tokens (B, N, embed_dim), registers first, at every pass."""
        self.network.eva.register_forward_hook(lambda _module, _arguments, output: see(output[0]))

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """The tokens (B, K, embed_dim) of some patches, which attend to one another and to the registers alone.

        Written out because Eva's own patch dropout gives timm a rotary embedding whose samples stand where the heads
        should.

        Raises:
            UserError: for an image of another size than the network was built for.
        """
        eva, first = self.network.eva, self._registers
        tokens, _ = self._embedded(x)
        tokens = eva.pos_drop(tokens if eva.pos_embed is None else tokens + eva.pos_embed)
        rows = (keep + first)[:, :, None].expand(-1, -1, tokens.shape[2])
        tokens = torch.cat((tokens[:, :first], tokens.gather(1, rows)), 1)
        rotary = None if eva.rope is None else eva.rope.get_embed()[keep][:, None]  # (B, 1, K, ·), alike for all heads
        for block in eva.blocks:
            tokens = block(tokens, rope=rotary)
        return eva.norm(tokens)[:, first:]

    def token_decoder(self, blocks: int) -> nn.Module:
        """Fresh transformer blocks with the width, heads and kinds of positions of the encoder's."""
        eva: Any = self.network.eva
        attention = eva.blocks[0].attn
        count = (1,) if eva.pos_embed is None else (eva.pos_embed.shape[1] - self._registers,)
        decoder = type(eva)(
            embed_dim=self.network.embed_dim,
            depth=blocks,
            num_heads=attention.num_heads,
            ref_feat_shape=self.planned_grid or count,
            use_rot_pos_emb=eva.rope is not None,
            use_abs_pos_emb=eva.pos_embed is not None,
            scale_attn_inner=not isinstance(attention.norm, nn.Identity),
        )
        return _TokensAlone(decoder)

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The map before the last up-sampling, which in Primus is the segmentation layer at once."""
        return self.network.up_projection.decode[:-1](features[-1])

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh last up-sampling, to an image in place of classes."""
        last = self.network.up_projection.decode[-1]
        return nn.ConvTranspose3d(last.in_channels, input_channels, last.kernel_size, last.stride)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of patch embedding and transformer."""
        yield from self.network.down_projection.parameters()
        yield from self.network.eva.parameters()
        if self.network.register_tokens is not None:
            yield self.network.register_tokens

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the up-projection without its last layer."""
        return self.network.up_projection.decode[:-1].parameters()

    def parts(self) -> Parts:
        """The stages are the transformer's blocks."""
        network = self.network
        stages = [list(block.parameters()) for block in network.eva.blocks]
        embedding = [*network.down_projection.parameters(), network.eva.pos_embed, network.register_tokens]
        stages[0] = [p for p in embedding if p is not None] + stages[0]
        stages[-1] = [*stages[-1], *network.eva.norm.parameters()]
        return Parts(stages, "encoder block", list(network.up_projection.decode[-1].parameters()))

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.eva, *self.network.up_projection.decode[:-1]]

    def recomputed(self) -> list[nn.Module]:
        """The transformer's blocks, and the steps of the up-projection before the last one."""
        return [*self.network.eva.blocks, *self.network.up_projection.decode[:-1]]

    @property
    def _registers(self) -> int:
        """Tokens that stand before those of the patches."""
        registers = self.network.register_tokens
        return 0 if registers is None else registers.shape[1]

    def _embedded(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """Registers and patches (B, R + N, embed_dim) before the transformer, and the grid of the patches."""
        embedded = self.network.down_projection(x)
        tokens = embedded.flatten(2).transpose(1, 2)
        if self._registers:
            tokens = torch.cat((self.network.register_tokens.expand(len(x), -1, -1), tokens), 1)
        self._check(tokens, x)
        return tokens, embedded.shape[2:]

    def _check(self, tokens: Tensor, x: Tensor) -> None:
        positions = self.network.eva.pos_embed
        if positions is not None and positions.shape[1] != tokens.shape[1]:
            raise UserError(
                f"{type(self.network).__name__} was built for {positions.shape[1]} tokens; an image of "
                f"{'x'.join(str(size) for size in x.shape[2:])} voxels gives {tokens.shape[1]}.",
                "Give the method windows of the plan's patch size, or use a convolutional network.",
            )


class _TokensAlone(nn.Module):
    """A transformer of dynamic_network_architectures, which has its grid built in, without its second result."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        return self.transformer(tokens)[0]


def _embedding(module: nn.Module) -> list[nn.Module]:
    """The layers of a patch embedding, in order: one convolution, or a residual stem with its stages. What PrimusV3
    adds of finer stages begins at a hundred-thousandth of the sum, and does not count."""
    if hasattr(module, "proj"):
        return [module.proj]
    return [module.stem, *module.stages, module.final_proj]


def _is_primus(network: nn.Module) -> bool:
    return all(hasattr(network, name) for name in ("down_projection", "eva", "up_projection"))


def _has_stem(network: nn.Module) -> bool:
    return _is_primus(network) and hasattr(network.down_projection, "stem")


def _has_one_layer(network: nn.Module) -> bool:
    return _is_primus(network) and not _has_stem(network)


def _embedded_patch(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    return list(arguments.get("patch_embed_size", [1] * dimensions))


PRIMUS = Family(
    name="Primus",
    classes=r"Primus(?!V\d).*",
    marker="down_projection.proj.",
    recognises=_has_one_layer,
    reader=PrimusReader,
    encoder="eva",
    stem="down_projection",
    image_layers=("down_projection.proj",),
    available="nnssl_plugin plan --preset primus-s",
    positions="eva.pos_embed",
    divisors=_embedded_patch,
    optimiser="adamw",
)
WITH_STEM = replace(
    PRIMUS,
    name="Primus with a convolutional stem",
    classes=r"PrimusV\d.*",
    marker="down_projection.stem.",
    recognises=_has_stem,
    image_layers=("down_projection.stem.blocks.0.conv1.conv", "down_projection.stem.blocks.0.conv1.all_modules.0"),
    available="its class in the plan",
    image_skips=("down_projection.stem.blocks.0.skip",),
)
FAMILIES = (PRIMUS, WITH_STEM)
