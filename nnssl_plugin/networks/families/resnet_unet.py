"""The package's own U-Net on torchvision's ResNet (``networks/resnet_unet.py``), in 2D."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnssl_plugin.networks.family import Family, Parts

STRIDES = (1, 2, 4, 8, 16, 32)
"""Of the image, of the first convolution, and of the four stages."""


class ResNetUNetReader:
    """The image is the finest stage of features: the decoder reads it."""

    dimensions = 2
    prefixes = ("encoder.", "decoder.")
    encoder_prefixes = ("encoder.",)
    head_prefixes = ("head.",)
    planned_grid = None
    strides = tuple((stride, stride) for stride in STRIDES)
    offsets = ((0.0, 0.0),) * len(STRIDES)  # kernels of 1, 3 and 7 with half of it as padding: centred at stride · i

    def __init__(self, network: nn.Module):
        self.network = network
        encoder: Any = network.encoder
        self.channels = (encoder.conv1.in_channels, *encoder.channels)

    def features(self, x: Tensor) -> list[Tensor]:
        """The image, then the maps of the encoder."""
        return [x, *self.network.encoder(x)]

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map, before the segmentation layer."""
        return self.network.decoder(features, skips=skips)

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image, in the place of the segmentation layer."""
        return nn.Conv2d(self.network.head.in_channels, input_channels, 1)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder."""
        return self.network.encoder.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder without its segmentation layer."""
        return self.network.decoder.parameters()

    def parts(self) -> Parts:
        """The stem is the first stage, torchvision's ``layer1`` to ``layer4`` are the others."""
        encoder: Any = self.network.encoder
        stages = [[*encoder.conv1.parameters(), *encoder.bn1.parameters()]]
        stages += [list(encoder.get_submodule(f"layer{number}").parameters()) for number in range(1, 5)]
        return Parts(stages, "encoder stage", list(self.network.head.parameters()))

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.encoder, self.network.decoder]


def _is_resnet_unet(network: nn.Module) -> bool:
    return hasattr(network, "head") and hasattr(getattr(network, "encoder", None), "layer4")


def _coarsest(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    return [STRIDES[-1]] * dimensions


RESNET_UNET = Family(
    name="ResNetUNet",
    classes="ResNetUNet",
    marker="encoder.layer1.0.conv1.",
    recognises=_is_resnet_unet,
    reader=ResNetUNetReader,
    encoder="encoder",
    stem="encoder.conv1",
    image_layers=("encoder.conv1", "decoder.image.0"),
    available="nnssl_plugin plan --preset resnet50-unet",
    divisors=_coarsest,
    optimiser="adamw",
)
FAMILIES = (RESNET_UNET,)
