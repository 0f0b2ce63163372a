"""U-Nets of dynamic_network_architectures: PlainConvUNet and ResidualEncoderUNet, in 2D and 3D."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nnssl_plugin.networks.family import Family, Parts, StageKeys, product_of_strides
from nnssl_plugin.networks.receptive_fields import chain


class UNetReader:
    """Encoder-decoder networks, whose encoder is called ``encoder`` and whose decoder has ``transpconvs``."""

    prefixes = ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
    encoder_prefixes = ("encoder.",)
    head_prefixes = ("decoder.seg_layers.",)
    planned_grid = None

    def __init__(self, network: nn.Module):
        self.network = network
        encoder = network.encoder
        self.channels = tuple(encoder.output_channels)
        self.dimensions = {nn.Conv2d: 2, nn.Conv3d: 3}[encoder.conv_op]
        stem = [encoder.stem] if isinstance(getattr(encoder, "stem", None), nn.Module) else []
        samplings = [
            chain((*stem, *encoder.stages[: number + 1]), self.dimensions) for number in range(len(encoder.stages))
        ]
        self.strides = tuple(sampling.stride for sampling in samplings)
        self.offsets = tuple(sampling.offset for sampling in samplings)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of all stages, fine to coarse."""
        return self.network.encoder(x)

    def on_bottleneck(self, see: Callable[[Tensor], None]) -> None:
        """Let ``see`` have the deepest map at every pass."""
        self.network.encoder.register_forward_hook(lambda _module, _arguments, output: see(output[-1]))

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map (B, channels[0], *spatial), before the segmentation layer."""
        decoder = self.network.decoder
        x = features[-1]
        for upsample, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(features[:-1]), strict=True):
            x = stage(torch.cat((upsample(x), skip if skips else torch.zeros_like(skip)), 1))
        return x

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image, in the place of the segmentation layer."""
        return self.network.encoder.conv_op(self.channels[0], input_channels, 1)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder."""
        return self.network.encoder.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder without its segmentation layers."""
        for module in (self.network.decoder.transpconvs, self.network.decoder.stages):
            yield from module.parameters()

    def parts(self) -> Parts:
        """The stem of a residual encoder counts to its first stage."""
        encoder = self.network.encoder
        stages = [list(stage.parameters()) for stage in encoder.stages]
        if getattr(encoder, "stem", None) is not None:
            stages[0] = [*encoder.stem.parameters(), *stages[0]]
        return Parts(stages, "encoder stage", list(self.network.decoder.seg_layers.parameters()))

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.encoder, *self.network.decoder.stages]

    def recomputed(self) -> list[nn.Module]:
        """The stages of encoder and decoder."""
        stem = getattr(self.network.encoder, "stem", None)
        first = [] if stem is None else [stem]
        return [*first, *self.network.encoder.stages, *self.network.decoder.stages]


def _is_unet(network: nn.Module) -> bool:
    return hasattr(network, "encoder") and hasattr(getattr(network, "decoder", None), "transpconvs")


def _is_residual(network: nn.Module) -> bool:
    return _is_unet(network) and hasattr(network.encoder, "stem")


def _is_plain(network: nn.Module) -> bool:
    return _is_unet(network) and not _is_residual(network)


PLAIN = Family(
    name="PlainConvUNet",
    classes="PlainConvUNet",
    marker="encoder.stages.0.0.convs.0.",
    recognises=_is_plain,
    reader=UNetReader,
    encoder="encoder.stages",
    stem="encoder.stages.0",
    image_layers=("encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"),
    available="nnUNetPlans",
    stage_keys=StageKeys(
        encoder=re.compile(r"^(?:decoder\.)?encoder\.stages\.(\d+)\."),
        decoder=re.compile(r"^decoder\.(?:stages|transpconvs|seg_layers)\.(\d+)\."),
        concatenated=re.compile(r"^decoder\.stages\.\d+\.(convs\.0|blocks\.0\.(conv1|skip\.\d+))\."),
        # the projection is the second entry of the skip of a block with a stride, else the first
        skip=re.compile(r"\.skip\.([01])\."),
    ),
    divisors=product_of_strides,
    deep_supervision=True,
)
RESIDUAL = replace(
    PLAIN,
    name="ResidualEncoderUNet",
    classes="ResidualEncoderUNet",
    marker="encoder.stages.0.blocks.0.",
    recognises=_is_residual,
    stem="encoder.stem",
    image_layers=("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
    available="nnUNetResEncUNetMPlans",
)
FAMILIES = (PLAIN, RESIDUAL)
