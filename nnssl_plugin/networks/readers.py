"""How each family of planned networks is read: where its features, its decoder and its trained parts are."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nnssl_plugin.errors import UserError


class UNetReader:
    """Encoder-decoder networks of dynamic_network_architectures (PlainConvUNet, ResidualEncoderUNet), 2D and 3D."""

    prefixes = ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")
    """Prefixes of the keys that a pretraining may train: everything but the segmentation layers."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.channels = tuple(network.encoder.output_channels)
        self.dimensions = {nn.Conv2d: 2, nn.Conv3d: 3}[network.encoder.conv_op]
        strides = torch.tensor(
            [[s] * self.dimensions if isinstance(s, int) else list(s) for s in network.encoder.strides]
        )
        self.strides = tuple(tuple(s) for s in strides.cumprod(0).tolist())

    @staticmethod
    def reads(network: nn.Module) -> bool:
        """Whether a network is of this family."""
        return hasattr(network, "encoder") and hasattr(getattr(network, "decoder", None), "transpconvs")

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of all stages, fine to coarse."""
        return self.network.encoder(x)

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

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.encoder, *self.network.decoder.stages]


class PrimusReader:
    """Primus of dynamic_network_architectures (Wald et al. 2025): a patch embedding, a transformer, an up-projection.

    Its tokens are the one stage of features, a map at the stride of the patch embedding. There are no skips.
    """

    dimensions = 3

    def __init__(self, network: nn.Module):
        self.network = network
        self.channels = (network.embed_dim,)
        layers = [module.stride for module in network.up_projection.modules() if isinstance(module, nn.ConvTranspose3d)]
        self.strides = (tuple(math.prod(axis) for axis in zip(*layers, strict=True)),)
        stages = range(len(network.up_projection.decode) - 1)  # the last one gives the classes
        self.prefixes = (
            f"{network.key_to_stem}.",
            f"{network.key_to_encoder}.",
            "register_tokens",
            *(f"up_projection.decode.{stage}." for stage in stages),
        )

    @staticmethod
    def reads(network: nn.Module) -> bool:
        """Whether a network is of this family."""
        return all(hasattr(network, name) for name in ("down_projection", "eva", "up_projection"))

    def features(self, x: Tensor) -> list[Tensor]:
        """The tokens as one map (B, embed_dim, *spatial / stride).

        Raises:
            UserError: for an image of another size than the network was built for.
        """
        embedded = self.network.down_projection(x)
        grid = embedded.shape[2:]
        tokens = embedded.flatten(2).transpose(1, 2)
        registers = self.network.register_tokens
        if registers is not None:
            tokens = torch.cat((registers.expand(len(x), -1, -1), tokens), 1)
        self._check(tokens, x)
        tokens, kept = self.network.eva(tokens)
        if registers is not None:
            tokens = tokens[:, registers.shape[1] :]
        tokens, _ = self.network.restore_full_sequence(tokens, kept, grid.numel())
        return [tokens.transpose(1, 2).unflatten(2, grid)]

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

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.eva, *self.network.up_projection.decode[:-1]]

    def _check(self, tokens: Tensor, x: Tensor) -> None:
        positions = self.network.eva.pos_embed
        if positions is not None and positions.shape[1] != tokens.shape[1]:
            raise UserError(
                f"{type(self.network).__name__} was built for {positions.shape[1]} tokens; an image of "
                f"{'x'.join(str(size) for size in x.shape[2:])} voxels gives {tokens.shape[1]}.",
                "Give the method windows of the plan's patch size, or use a convolutional network.",
            )


class SwinUNETRReader:
    """MONAI's SwinUNETR (Hatamizadeh et al. 2022), 2D and 3D: a Swin transformer, then a convolutional decoder.

    The encoder is the transformer, whose maps have strides 2 to 32; its skip connections pass residual blocks
    (``encoder1`` to ``encoder10``), which belong to the decoder, as most pretrainings train the transformer alone. The
    stage of stride 1 is the image itself: ``encoder1``, which makes the finest skip connection out of it, costs more
    than the whole transformer, and methods that read no decoder are spared it.
    """

    prefixes = ("swinViT.", *(f"encoder{n}." for n in (1, 2, 3, 4, 10)), *(f"decoder{n}." for n in (1, 2, 3, 4, 5)))

    def __init__(self, network: nn.Module):
        self.network = network
        self._conv = type(network.swinViT.patch_embed.proj)
        self.dimensions = {nn.Conv2d: 2, nn.Conv3d: 3}[self._conv]
        width = network.swinViT.embed_dim
        self.channels = (network.swinViT.patch_embed.proj.in_channels, *(width * 2**stage for stage in range(5)))
        self.strides = tuple((2**stage,) * self.dimensions for stage in range(6))

    @staticmethod
    def reads(network: nn.Module) -> bool:
        """Whether a network is of this family."""
        return all(hasattr(network, name) for name in ("swinViT", "encoder10", "decoder1"))

    def features(self, x: Tensor) -> list[Tensor]:
        """The image, then the maps of the transformer, fine to coarse.

        Raises:
            UserError: for an image that cannot be halved five times.
        """
        if any(size % self.strides[-1][0] for size in x.shape[2:]):
            raise UserError(
                f"{type(self.network).__name__} halves every axis five times, which an image of "
                f"{'x'.join(str(size) for size in x.shape[2:])} voxels does not allow.",
                "Give the method windows of the plan's patch size, a multiple of 32 along every axis.",
            )
        return [x, *self.network.swinViT(x, self.network.normalize)]

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map (B, feature_size, *spatial), before the segmentation layer.

        Without skips the residual blocks still run, and get zero gradients: several ranks wait for one of each
        parameter that is trained.
        """
        x = self.network.encoder10(features[-1])
        ways = zip(self._upsampling(), self._skips(), features[:-1], strict=True)
        for upsample, skip, values in reversed(list(ways)):
            x = upsample(x, skip(values) if skips else 0 * skip(values))
        return x

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image, in the place of the segmentation layer."""
        return self._conv(self.channels[1], input_channels, 1)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the transformer."""
        return self.network.swinViT.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the residual blocks and of the decoder, without its segmentation layer."""
        for module in (*self._skips(), self.network.encoder10, *self._upsampling()):
            yield from module.parameters()

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.swinViT, *self._skips()[:-1], self.network.encoder10, *self._upsampling()]

    def _skips(self) -> list[nn.Module]:
        """What stands on the skip connections, fine to coarse."""
        return [*(getattr(self.network, f"encoder{n}") for n in (1, 2, 3, 4)), nn.Identity()]

    def _upsampling(self) -> list[nn.Module]:
        return [getattr(self.network, f"decoder{n}") for n in (1, 2, 3, 4, 5)]


READERS = (UNetReader, PrimusReader, SwinUNETRReader)
"""Families of networks that pretraining can read."""


def reader_of(network: nn.Module) -> UNetReader | PrimusReader | SwinUNETRReader:
    """The reader of a bare network.

    Raises:
        UserError: for a network of no known family.
    """
    for reader in READERS:
        if reader.reads(network):
            return reader(network)
    raise UserError(
        f"{type(network).__name__} is not a network that pretraining can read.",
        "Use a plan with PlainConvUNet or ResidualEncoderUNet (nnUNetPlans, nnUNetResEncUNet*Plans), or with Primus or "
        "SwinUNETR (nnssl_plugin plan --preset primus-s, swinunetr-b).",
    )
