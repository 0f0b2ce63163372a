"""Which tensor of a checkpoint belongs to which of a network, and what each of them is for."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

FAMILIES = {
    "PlainConvUNet": "encoder.stages.0.0.convs.0.",
    "ResidualEncoderUNet": "encoder.stages.0.blocks.0.",
    "Primus": "down_projection.proj.",
    "Primus with a convolutional stem": "down_projection.stem.",
    "SwinUNETR": "swinViT.patch_embed.",
}
"""Family of networks → part of a key that only it has."""
MISSING = "not in the checkpoint"
PREFIX_TOKENS = ("cls_token", "reg_token", "register_tokens")
"""Tokens that stand before those of the image, in the positional embedding too."""
ENCODER = ("encoder.", "swinViT.")
"""Prefixes of the encoder in networks that do not name it. MONAI's SwinUNETR calls ``encoder1`` … ``encoder10`` what
stands between the transformer and the decoder; few pretrainings train it."""
IMAGE_READERS = {"SwinUNETR": ("swinViT.patch_embed.proj", "encoder1.layer.conv1.conv", "encoder1.layer.conv3.conv")}
"""Class of networks that do not name the layers that read the image → those layers."""
DECODER_STAGE = re.compile(r"^decoder\.(?:stages|transpconvs|seg_layers)\.(\d+)\.")
ENCODER_STAGE = re.compile(r"^(?:decoder\.)?encoder\.stages\.(\d+)\.")
BLOCK = re.compile(r"\b(?:convs|blocks)\.(\d+)\.")
CONCATENATED = re.compile(r"^decoder\.stages\.\d+\.(convs\.0|blocks\.0\.(conv1|skip\.\d+))\.")
"""Layers of a decoder that read the upsampled map and the skip connection, concatenated in equal parts."""
SKIP = re.compile(r"\.skip\.([01])\.")
"""The projection of a residual block's skip is its second entry where the block has a stride, else the first."""

Kind = Literal["kernel", "patch", "upsampling", "per channel", "positions", "tokens", "other"]


@dataclass(frozen=True)
class Role:
    """What a tensor is for, as far as its shape depends on it."""

    kind: Kind
    reads_image: bool = False
    """Its input channels are those of the image."""
    parts: int = 1
    """Number of equal parts that its input channels are concatenated from."""


class Layout:
    """What the tensors of a network are for, from its modules and from what it says of itself.

    Networks of dynamic_network_architectures name their encoder (``key_to_encoder``), stem (``key_to_stem``), the
    layers that read the image (``keys_to_in_proj``) and the positional embedding (``key_to_lpe``).
    """

    def __init__(self, target: nn.Module):
        self.target = target
        self.positions: str | None = getattr(target, "key_to_lpe", None)
        self.transformer = any(isinstance(module, nn.LayerNorm) for module in target.modules())
        named = [getattr(target, name, None) for name in ("key_to_encoder", "key_to_stem")]
        named = tuple(f"{name}." for name in named if name)
        self._encoder = (*named, *PREFIX_TOKENS) if named else ENCODER
        self._image = _image_readers(target)
        decode = getattr(getattr(target, "up_projection", None), "decode", ())
        self._heads = ("out.", f"up_projection.decode.{len(decode) - 1}.")  # MONAI, Primus

    def part(self, keys: Sequence[str]) -> Literal["encoder", "decoder", "head"]:
        """The part of the network that a tensor belongs to; ``head`` gives the classes."""
        if any(".seg_layers." in key or key.startswith(self._heads) for key in keys):
            return "head"
        return "encoder" if any(key.startswith(self._encoder) for key in keys) else "decoder"

    def role(self, keys: Sequence[str], tensor: Tensor) -> Role:
        """What the tensor under ``keys`` (its aliases) is for."""
        if self.positions in keys:
            return Role("positions")
        place, _, name = keys[0].rpartition(".")
        if name in PREFIX_TOKENS:
            return Role("tokens")
        module = self.target.get_submodule(place)
        if isinstance(module, _ConvNd | _NormBase) and tensor.dim() == 1:
            return Role("per channel")
        if not isinstance(module, _ConvNd) or module.groups != 1:
            return Role("other")
        cells = tuple(module.kernel_size) == tuple(module.stride)
        if isinstance(module, _ConvTransposeNd):
            return Role("upsampling" if cells else "other")
        concatenated = any(CONCATENATED.match(key) for key in keys) and module.in_channels % 2 == 0
        return Role(
            "patch" if cells and max(module.kernel_size) > 1 else "kernel",
            reads_image=any(key.startswith(self._image) for key in keys),
            parts=2 if concatenated else 1,
        )

    def token_grid(self) -> tuple[int, ...] | None:
        """The grid of tokens that the network was built for, where its rotary embedding tells."""
        if self.positions is None:
            return None
        rotary = getattr(self.target.get_submodule(self.positions.rpartition(".")[0]), "rope", None)
        grid = getattr(rotary, "feat_shape", None)
        return tuple(int(size) for size in grid) if grid is not None else None


class Correspondence:
    """Keys of a network → keys of a checkpoint of the same family with other numbers of stages and blocks.

    Stages are matched from the finest: those of the encoder by their number, those of a U-Net's decoder, which counts
    from the coarsest, from its end. Blocks within a stage are matched from the first.

    Args:
        source: keys of the checkpoint.
        target: keys of the network.
    """

    def __init__(self, source: Iterable[str], target: Iterable[str]):
        self.source = frozenset(source)
        self._before, self._now = _coarsest(self.source), _coarsest(target)
        self._shift = self._before - self._now if self._before else 0

    def candidates(self, keys: Sequence[str]) -> list[str]:
        """Keys that the checkpoint may hold the tensor under, best first; empty for a decoder stage that it lacks."""
        moved = [key for key in map(self._moved, keys) if key is not None]
        swapped = [SKIP.sub(lambda found: f".skip.{1 - int(found[1])}.", key) for key in moved]
        return moved + [key for key in swapped if key not in moved]

    def why_missing(self, key: str) -> str:
        """Why the checkpoint lacks a key of the network: a stage or block more than it has, or no known reason."""
        place, encoder = self._moved(key), ENCODER_STAGE.match(key)
        if place is None or (encoder and self._before and int(encoder[1]) > self._before):
            return f"new stage: {self._before + 1} in the checkpoint, {self._now + 1} here"
        for block in BLOCK.finditer(place):
            stage = place[: block.start(1)]
            if self._holds(f"{stage}0.") and not self._holds(f"{stage}{block[1]}."):
                return "new block: the checkpoint has fewer in this place"
        return MISSING

    def _moved(self, key: str) -> str | None:
        stage = DECODER_STAGE.match(key)
        if stage is None or not self._shift:
            return key
        number = int(stage[1]) + self._shift
        return f"{key[: stage.start(1)]}{number}{key[stage.end(1) :]}" if number >= 0 else None

    def _holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.source)


def family(keys: Iterable[str]) -> str | None:
    """The family of networks that the keys of a state dict belong to; None where they tell none."""
    keys = list(keys)
    return next((name for name, marker in FAMILIES.items() if any(marker in key for key in keys)), None)


def prefix_tokens(state: dict[str, Tensor]) -> int:
    """Number of tokens that stand before those of the image."""
    return sum(value.shape[1] for key, value in state.items() if key.rpartition(".")[2] in PREFIX_TOKENS)


def _coarsest(keys: Iterable[str]) -> int:
    """Number of a U-Net's coarsest encoder stage: its decoder's number of stages, where the keys hold a decoder."""
    keys = list(keys)
    decoder = [int(stage[1]) + 1 for stage in map(DECODER_STAGE.match, keys) if stage]
    encoder = [int(stage[1]) for stage in map(ENCODER_STAGE.match, keys) if stage]
    return max(decoder or encoder, default=0)


def _image_readers(target: nn.Module) -> tuple[str, ...]:
    """Prefixes of the layers that read the image: those the network names, with the projection of a residual skip."""
    named = tuple(getattr(target, "keys_to_in_proj", IMAGE_READERS.get(type(target).__name__, ())))
    if not named:
        named = tuple(name for name, module in target.named_modules() if isinstance(module, _ConvNd))[:1]
    blocks = sorted({name.partition(".conv1.")[0] for name in named if ".conv1." in name})
    return tuple(f"{name}." for name in (*named, *(f"{block}.skip" for block in blocks)))
