"""The package's own vision transformer over patches (``networks/patch_vit.py``), 2D and 3D."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnssl_plugin.networks.family import Family, Parts


class PatchViTReader:
    """The tokens are the one stage of features beside the image itself, the decoder's only skip connection."""

    prefixes = ("encoder.", "decoder.")
    encoder_prefixes = ("encoder.",)
    head_prefixes = ("head.",)
    planned_grid = None

    def __init__(self, network: nn.Module):
        self.network = network
        embedding: Any = network.encoder.patch_embed.proj
        self.dimensions = len(embedding.kernel_size)
        self.channels = (embedding.in_channels, network.encoder.embed_dim)
        self.strides = ((1,) * self.dimensions, tuple(embedding.stride))
        self.offsets = tuple(tuple((stride - 1) / 2 for stride in strides) for strides in self.strides)

    def features(self, x: Tensor) -> list[Tensor]:
        """The image, then the tokens as one map (B, embed_dim, *spatial / patch)."""
        return [x, self.network.encoder.map(x)]

    @property
    def has_summary(self) -> bool:
        """Whether the network was planned with a summary token."""
        return self.network.encoder.cls_token is not None

    def summarised(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The summary token (B, embed_dim), and what :meth:`features` gives."""
        summary, tokens = self.network.encoder(x)
        return summary, [x, self.network.encoder.as_map(tokens, x)]

    def on_bottleneck(self, see: Callable[[Tensor], None]) -> None:
        """Let ``see`` have the tokens (B, N, embed_dim) at every pass."""
        self.network.encoder.register_forward_hook(lambda _module, _arguments, output: see(output[1]))

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """The tokens (B, K, embed_dim) of some patches, which attend to one another and to the summary alone."""
        return self.network.encoder(x, keep)[1]

    def token_decoder(self, blocks: int) -> nn.Module:
        """Fresh transformer blocks of the encoder's width and heads; they know their places by fixed positions."""
        return self.network.encoder.fresh_blocks(blocks)

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map (B, decoder_width, *spatial), before the segmentation layer.

        Args:
            features: what :meth:`features` gave, or the tokens' map alone, which leaves the skip connection zero.
            skips: whether the image is read.
        """
        image = features[0] if skips and len(features) > 1 else None
        return self.network.decoder(features[-1], image)

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image, in the place of the segmentation layer."""
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[self.dimensions]
        return convolution(self.network.decoder.width, input_channels, 1)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of patch embedding and transformer."""
        return self.network.encoder.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder without its segmentation layer."""
        return self.network.decoder.parameters()

    def parts(self) -> Parts:
        """The stages are the transformer's blocks."""
        encoder = self.network.encoder
        stages = [list(block.parameters()) for block in encoder.blocks]
        first = [*encoder.patch_embed.parameters(), *([] if encoder.cls_token is None else [encoder.cls_token])]
        stages[0] = first + stages[0]
        stages[-1] = [*stages[-1], *encoder.norm.parameters()]
        return Parts(stages, "encoder block", list(self.network.head.parameters()))

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [*self.network.encoder.blocks, self.network.decoder]

    def recomputed(self) -> list[nn.Module]:
        """The transformer's blocks, and the decoder."""
        return [*self.network.encoder.blocks, self.network.decoder]


def _is_patch_vit(network: nn.Module) -> bool:
    return hasattr(network, "head") and hasattr(getattr(network, "encoder", None), "patch_embed")


def _patch(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    return list(arguments.get("patch_size", (4, 16, 16)[-dimensions:]))


PATCH_VIT = Family(
    name="PatchViT",
    classes="PatchViT",
    marker="encoder.patch_embed.",
    recognises=_is_patch_vit,
    reader=PatchViTReader,
    encoder="encoder",
    stem="encoder.patch_embed",
    image_layers=("encoder.patch_embed.proj", "decoder.image.0"),
    available="nnssl_plugin plan --preset patch-vit-b",
    divisors=_patch,
    optimiser="adamw",
)
FAMILIES = (PATCH_VIT,)
