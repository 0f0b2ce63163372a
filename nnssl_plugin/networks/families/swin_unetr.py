"""MONAI's SwinUNETR (Hatamizadeh et al. 2022), 2D and 3D: a Swin transformer, then a convolutional decoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import Family, Parts


class SwinUNETRReader:
    """The encoder is the transformer, whose maps have strides 2 to 32.

    Its skip connections pass residual blocks (``encoder1`` to ``encoder10``), which belong to the decoder, as most
    pretrainings train the transformer alone. The stage of stride 1 is the image itself: ``encoder1``, which makes the
    finest skip connection out of it, costs more than the whole transformer, and methods that read no decoder are spared
    it.
    """

    prefixes = ("swinViT.", *(f"encoder{n}." for n in (1, 2, 3, 4, 10)), *(f"decoder{n}." for n in (1, 2, 3, 4, 5)))
    encoder_prefixes = ("swinViT.",)
    head_prefixes = ("out.",)
    planned_grid = None

    def __init__(self, network: nn.Module):
        self.network = network
        self._conv = type(network.swinViT.patch_embed.proj)
        self.dimensions = {nn.Conv2d: 2, nn.Conv3d: 3}[self._conv]
        width = network.swinViT.embed_dim
        self.channels = (network.swinViT.patch_embed.proj.in_channels, *(width * 2**stage for stage in range(5)))
        self.strides = tuple((2**stage,) * self.dimensions for stage in range(6))
        # embedding and merging read cells of two voxels: every token is the middle of its own cell
        self.offsets = tuple(tuple((stride - 1) / 2 for stride in strides) for strides in self.strides)

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

    def on_bottleneck(self, see: Callable[[Tensor], None]) -> None:
        """Let ``see`` have the transformer's deepest map at every pass."""
        self.network.swinViT.register_forward_hook(lambda _module, _arguments, output: see(output[-1]))

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The finest map (B, feature_size, *spatial), before the segmentation layer.

        Without skips the residual blocks still run, and get zero gradients: several ranks wait for one of each
        parameter that is trained.
        """
        x = self.network.encoder10(features[-1])
        levels = zip(self._upsampling(), self._skips(), features[:-1], strict=True)
        for upsample, skip, values in reversed(list(levels)):
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

    def parts(self) -> Parts:
        """Stages of the transformer; in the second version each begins with a residual block (``layers1c`` …)."""
        transformer = self.network.swinViT
        parts = [[getattr(transformer, name, None) for name in (f"layers{n}c", f"layers{n}")] for n in (1, 2, 3, 4)]
        parts[0].insert(0, transformer.patch_embed)
        stages = [[p for part in stage if part is not None for p in part.parameters()] for stage in parts]
        return Parts(stages, "encoder stage", list(self.network.out.parameters()))

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        return [self.network.swinViT, *self._skips()[:-1], self.network.encoder10, *self._upsampling()]

    def _skips(self) -> list[nn.Module]:
        """What stands on the skip connections, fine to coarse."""
        return [*(getattr(self.network, f"encoder{n}") for n in (1, 2, 3, 4)), nn.Identity()]

    def _upsampling(self) -> list[nn.Module]:
        return [getattr(self.network, f"decoder{n}") for n in (1, 2, 3, 4, 5)]


def _is_swin(network: nn.Module) -> bool:
    return all(hasattr(network, name) for name in ("swinViT", "encoder10", "decoder1"))


def _halved_five_times(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    return [32] * dimensions


SWIN_UNETR = Family(
    name="SwinUNETR",
    classes="SwinUNETR",
    marker="swinViT.patch_embed.",
    recognises=_is_swin,
    reader=SwinUNETRReader,
    encoder="swinViT",
    stem="swinViT.patch_embed",
    image_layers=("swinViT.patch_embed.proj", "encoder1.layer.conv1.conv", "encoder1.layer.conv3.conv"),
    available="nnssl_plugin plan --preset swinunetr-b",
    divisors=_halved_five_times,
    optimiser="adamw",
)
FAMILIES = (SWIN_UNETR,)
