"""MONAI's SegResNetDS (Myronenko 2018), 2D and 3D: a residual U-Net whose skip connections are added."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import Family, Parts
from nnssl_plugin.networks.receptive_fields import chain

BLOCKS_DOWN = (1, 2, 2, 4)
"""MONAI's default of the argument ``blocks_down``."""


class SegResNetReader:
    """Stages of the encoder begin with its residual blocks and end before the strided convolution to the next."""

    encoder_prefixes = ("encoder.",)
    planned_grid = None

    def __init__(self, network: nn.Module):
        self.network = network
        encoder: Any = network.encoder
        self._conv = type(encoder.conv_init)
        self.dimensions = {nn.Conv2d: 2, nn.Conv3d: 3}[self._conv]
        self.channels = tuple(encoder.init_filters * 2**stage for stage in range(len(encoder.layers)))
        down = [level["downsample"] for level in encoder.layers]
        samplings = [chain((encoder.conv_init, *down[:stage]), self.dimensions) for stage in range(len(down))]
        self.strides = tuple(sampling.stride for sampling in samplings)
        self.offsets = tuple(sampling.offset for sampling in samplings)
        levels = range(len(network.up_layers))
        self.prefixes = (
            "encoder.",
            *(f"up_layers.{level}.{part}." for level in levels for part in ("upsample", "blocks")),
        )
        self.head_prefixes = tuple(f"up_layers.{level}.head." for level in levels)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of all stages, fine to coarse.

        Raises:
            UserError: for an image that the strides do not divide.
        """
        divisors = self.strides[-1]
        if any(size % divisor for size, divisor in zip(x.shape[2:], divisors, strict=True)):
            raise UserError(
                f"{type(self.network).__name__} needs sizes that {_by(divisors)} divides, which those of an image of "
                f"{_by(x.shape[2:])} voxels are not.",
                "Give the method windows of the plan's patch size.",
            )
        return self.network.encoder(x)

    def on_bottleneck(self, see: Callable[[Tensor], None]) -> None:
        """Let ``see`` have the deepest map at every pass."""
        self.network.encoder.register_forward_hook(lambda _module, _arguments, output: see(output[-1]))

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map (B, init_filters, *spatial), before the segmentation layer."""
        x = features[-1]
        for level, skip in zip(self.network.up_layers, reversed(features[:-1]), strict=True):
            x = level["upsample"](x)
            x = level["blocks"](x + skip if skips else x)
        return x

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image, in the place of the segmentation layer."""
        return self._conv(self.channels[0], input_channels, 1)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder."""
        return self.network.encoder.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder without its segmentation layers."""
        for module in self._decoder():
            yield from module.parameters()

    def parts(self) -> Parts:
        """The first convolution counts to the first stage, a strided one to the stage before it."""
        encoder = self.network.encoder
        stages = [list(level.parameters()) for level in encoder.layers]
        stages[0] = [*encoder.conv_init.parameters(), *stages[0]]
        head = [p for level in self.network.up_layers for p in level["head"].parameters()]
        return Parts(stages, "encoder stage", head)

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.encoder, *self._decoder()]

    def _decoder(self) -> list[nn.Module]:
        return [level[part] for level in self.network.up_layers for part in ("upsample", "blocks")]


def _is_seg_res_net(network: nn.Module) -> bool:
    return hasattr(getattr(network, "encoder", None), "conv_init") and hasattr(network, "up_layers")


def _halved_between_stages(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    """Every axis is halved between stages; with a ``resolution`` (mm), first those of finer voxels alone."""
    halvings = range(len(arguments.get("blocks_down") or BLOCKS_DOWN) - 1)
    resolution = arguments.get("resolution") or [1] * dimensions
    ahead = [math.floor(math.log2(max(resolution) / size)) for size in resolution]
    return [2 ** sum(level < own or level >= max(ahead) for level in halvings) for own in ahead]


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)


SEG_RES_NET = Family(
    name="SegResNetDS",
    classes="SegResNetDS",
    marker="encoder.conv_init.",
    recognises=_is_seg_res_net,
    reader=SegResNetReader,
    encoder="encoder.layers",
    stem="encoder.conv_init",
    image_layers=("encoder.conv_init",),
    available="nnssl_plugin plan --preset segresnet",
    divisors=_halved_between_stages,
    optimiser="adamw",
)
FAMILIES = (SEG_RES_NET,)
