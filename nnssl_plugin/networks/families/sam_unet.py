"""The package's own network on timm's encoder of Segment Anything (``networks/sam_unet.py``), in 2D."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnssl_plugin.networks.family import Family, Parts

PATCH = 16
"""SAM's, in pixels."""


class SAMUNetReader:
    """The tokens are the one stage of features beside the image itself, the decoder's only skip connection."""

    dimensions = 2
    prefixes = ("vit.", "decoder.")
    encoder_prefixes = ("vit.",)
    head_prefixes = ("head.",)
    planned_grid = None  # positions are interpolated to the image

    def __init__(self, network: nn.Module):
        self.network = network
        vit: Any = network.vit
        embedding = vit.patch_embed.proj
        self.channels = (embedding.in_channels, vit.num_features)
        self.strides = ((1, 1), tuple(embedding.stride))
        self.offsets = tuple(tuple((stride - 1) / 2 for stride in strides) for strides in self.strides)

    def features(self, x: Tensor) -> list[Tensor]:
        """The image, then the tokens as one map."""
        return [x, self.network.vit(x)]

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map (B, decoder_width, H, W), before the segmentation layer."""
        return self.network.decoder(features[-1], features[0] if skips else None)

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image, in the place of the segmentation layer."""
        return nn.Conv2d(self.network.decoder.width, input_channels, 1)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the transformer."""
        return self.network.vit.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder without its segmentation layer."""
        return self.network.decoder.parameters()

    def parts(self) -> Parts:
        """The stages are the transformer's blocks; embedding and positions count to the first, the neck to the last."""
        vit: Any = self.network.vit
        stages = [list(block.parameters()) for block in vit.blocks]
        positions = [] if vit.pos_embed is None else [vit.pos_embed]
        stages[0] = [*vit.patch_embed.parameters(), *positions, *stages[0]]
        stages[-1] = [*stages[-1], *vit.neck.parameters()]
        return Parts(stages, "encoder block", list(self.network.head.parameters()))

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [*self.network.vit.blocks, self.network.decoder]


def _is_sam_unet(network: nn.Module) -> bool:
    return hasattr(network, "head") and hasattr(getattr(network, "vit", None), "patch_embed")


def _patch(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    return [arguments.get("patch_size", PATCH)] * dimensions


SAM_UNET = Family(
    name="SAMUNet",
    classes="SAMUNet",
    marker="vit.patch_embed.",
    recognises=_is_sam_unet,
    reader=SAMUNetReader,
    encoder="vit",
    stem="vit.patch_embed",
    image_layers=("vit.patch_embed.proj", "decoder.image.0"),
    available="nnssl_plugin plan --preset samvit-b-unet",
    divisors=_patch,
    optimiser="adamw",
)
FAMILIES = (SAM_UNET,)
