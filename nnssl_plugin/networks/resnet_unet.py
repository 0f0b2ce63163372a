"""A U-Net whose encoder is torchvision's ResNet: ``nnssl_plugin.networks.resnet_unet.ResNetUNet``, in 2D.

Nguyen et al., LVM-Med, section 4.1 and appendix B: a U-Net with a ResNet-50. The encoder's keys are torchvision's,
below ``encoder.``, so that weights of either serve the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.families.resnet_unet import RESNET_UNET

STAGES = 4
RGB = 3
"""Channels that torchvision's network reads."""


class ResNetUNet(nn.Module):
    """ResNet of bottleneck blocks, and a decoder with skip connections from every stage and from the image.

    Args:
        input_channels: channels of the image (B, input_channels, H, W).
        num_classes: channels of the output, at the size of the image.
        blocks: of each of the four stages; [3, 4, 6, 3] is ResNet-50.
        width_per_group: torchvision's; 64 is ResNet-50, and 128 Wide ResNet-50.
        decoder_features: channels of the decoder's maps, from a sixteenth of the size to the whole.
        deep_supervision: may be False: the network has one output.

    Raises:
        UserError: for another number of stages, and where deep supervision is asked for.
    """

    key_to_encoder = RESNET_UNET.encoder
    key_to_stem = RESNET_UNET.stem
    keys_to_in_proj = RESNET_UNET.image_layers

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 6, 3),
        width_per_group: int = 64,
        decoder_features: Sequence[int] = (256, 128, 64, 32, 16),
        deep_supervision: bool = False,
    ):
        super().__init__()
        _check(blocks, decoder_features, deep_supervision)
        self.encoder = ResNetEncoder(input_channels, list(blocks), width_per_group)
        self.decoder = UNetDecoder(input_channels, self.encoder.channels, decoder_features)
        self.head = nn.Conv2d(decoder_features[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) of an image (B, input_channels, H, W), whose sizes 32 divides."""
        return self.head(self.decoder([x, *self.encoder(x)]))


class ResNetEncoder(ResNet):
    """torchvision's ResNet without its classifier, for any number of channels; arguments as of :class:`ResNetUNet`."""

    def __init__(self, input_channels: int, blocks: list[int], width_per_group: int):
        super().__init__(Bottleneck, blocks, width_per_group=width_per_group)
        del self.fc
        if input_channels != RGB:
            first = self.conv1
            self.conv1 = nn.Conv2d(input_channels, first.out_channels, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        self.channels = (self.conv1.out_channels, *(stage[-1].conv3.out_channels for stage in stages))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]  # torchvision's gives logits
        """Maps at a half, a quarter … a thirty-second of the image's size."""
        maps = [self.relu(self.bn1(self.conv1(x)))]
        maps.append(self.layer1(self.maxpool(maps[-1])))
        for stage in (self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps


class UNetDecoder(nn.Module):
    """Doubled sizes, each joined with the encoder's map of that size; instance normalisation, for small batches."""

    def __init__(self, input_channels: int, encoder_channels: Sequence[int], features: Sequence[int]):
        super().__init__()
        self.image = _convolution(input_channels, features[-1])
        below = [encoder_channels[-1], *features[:-1]]
        skips = [*reversed(encoder_channels[:-1]), features[-1]]
        self.levels = nn.ModuleList(
            nn.Sequential(_convolution(before + skip, after), _convolution(after, after))
            for before, skip, after in zip(below, skips, features, strict=True)
        )

    def forward(self, maps: Sequence[Tensor], *, skips: bool = True) -> Tensor:
        """The finest map (B, features[-1], H, W).

        Args:
            maps: the image and the encoder's maps, fine to coarse.
            skips: ``False`` replaces all but the coarsest map by zeros.
        """
        x = maps[-1]
        finest = self.image(maps[0])
        for level, skip in zip(self.levels, [*reversed(maps[1:-1]), finest], strict=True):
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            x = level(torch.cat((x, skip if skips else 0 * skip), 1))
        return x


def _convolution(before: int, after: int) -> nn.Sequential:
    layers = nn.Conv2d(before, after, 3, padding=1), nn.InstanceNorm2d(after, affine=True), nn.LeakyReLU()
    return nn.Sequential(*layers)


def _check(blocks: Sequence[int], decoder_features: Sequence[int], deep_supervision: bool) -> None:
    if len(blocks) != STAGES or len(decoder_features) != STAGES + 1:
        raise UserError(
            f"ResNetUNet has four stages and five decoder levels, not {len(blocks)} and {len(decoder_features)}.",
            "Set blocks and decoder_features in the plan, for example [3, 4, 6, 3] and [256, 128, 64, 32, 16].",
        )
    if deep_supervision:
        raise UserError(
            "ResNetUNet has no deep supervision, which this trainer asks for.",
            "Train with -tr PretrainedSegmentationTrainer; from random weights with the plan of "
            "nnssl_plugin adapt --from-scratch.",
        )
