"""Which tensor of a checkpoint belongs to which of a network, and what each of them is for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from nnssl_plugin.networks.family import Family, family_of, family_of_keys

MISSING = "not in the checkpoint"
PREFIX_TOKENS = ("cls_token", "reg_token", "register_tokens")
"""Tokens that stand before those of the image, in the positional embedding too."""
OF_UNKNOWN_FAMILY = ("encoder.",)
"""Prefixes of the encoder's keys in a network of no known family."""

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
    """What the tensors of a network are for, from its modules and from what is known of its family."""

    def __init__(self, target: nn.Module):
        self.target = target
        self.transformer = any(isinstance(module, nn.LayerNorm) for module in target.modules())
        self.family = family_of(target)
        reader = self.family.reader(target) if self.family else None
        self.positions = self.family.positions if self.family else None
        self._stage_keys = self.family.stage_keys if self.family else None
        self._encoder = (*reader.encoder_prefixes, *PREFIX_TOKENS) if reader else OF_UNKNOWN_FAMILY
        self._heads = reader.head_prefixes if reader else ()
        self._image = _image_layers(target, self.family)
        self.token_grid = reader.planned_grid if reader else None

    def part(self, keys: Sequence[str]) -> Literal["encoder", "decoder", "head"]:
        """The part of the network that a tensor belongs to; ``head`` gives the classes."""
        if any(key.startswith(self._heads) for key in keys):
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
        pattern = self._stage_keys and self._stage_keys.concatenated
        concatenated = pattern and any(pattern.match(key) for key in keys) and module.in_channels % 2 == 0
        return Role(
            "patch" if cells and max(module.kernel_size) > 1 else "kernel",
            reads_image=any(key.startswith(self._image) for key in keys),
            parts=2 if concatenated else 1,
        )


class Correspondence:
    """Keys of a network → keys of a checkpoint of the same family with other numbers of stages and blocks.

    Stages are matched from the finest: those of the encoder by their number, those of a U-Net's decoder, which counts
    from the coarsest, from its end. Blocks within a stage are matched from the first.

    Args:
        source: keys of the checkpoint.
        target: keys of the network.
    """

    def __init__(self, source: Iterable[str], target: Iterable[str]):
        self.source, target = frozenset(source), list(target)
        self._family = family_of_keys(target)
        self._stage_keys = self._family.stage_keys if self._family else None
        self._before, self._now = self._coarsest(self.source), self._coarsest(target)
        self._shift = self._before - self._now if self._before else 0

    def candidates(self, keys: Sequence[str]) -> list[str]:
        """Keys that the checkpoint may hold the tensor under, best first; empty for a decoder stage that it lacks."""
        moved = [key for key in map(self._moved, keys) if key is not None]
        if self._stage_keys is None:
            return moved
        swapped = [self._stage_keys.skip.sub(lambda found: f".skip.{1 - int(found[1])}.", key) for key in moved]
        return moved + [key for key in swapped if key not in moved]

    def why_missing(self, key: str) -> str:
        """Why the checkpoint lacks a key of the network: a stage or block more than it has, or no known reason."""
        if self._family is None:
            return MISSING
        place = self._moved(key)
        encoder = self._stage_keys.encoder.match(key) if self._stage_keys else None
        if place is None or (encoder and self._before and int(encoder[1]) > self._before):
            return f"new stage: {self._before + 1} in the checkpoint, {self._now + 1} here"
        for block in self._family.block_key.finditer(place):
            stage = place[: block.start(1)]
            if self._holds(f"{stage}0.") and not self._holds(f"{stage}{block[1]}."):
                return "new block: the checkpoint has fewer in this place"
        return MISSING

    def _moved(self, key: str) -> str | None:
        stage = self._stage_keys.decoder.match(key) if self._stage_keys and self._shift else None
        if stage is None:
            return key
        number = int(stage[1]) + self._shift
        return f"{key[: stage.start(1)]}{number}{key[stage.end(1) :]}" if number >= 0 else None

    def _coarsest(self, keys: Iterable[str]) -> int:
        """Number of the coarsest encoder stage: the decoder's number of stages, where the keys hold a decoder."""
        if self._stage_keys is None:
            return 0
        keys = list(keys)
        decoder = [int(stage[1]) + 1 for stage in map(self._stage_keys.decoder.match, keys) if stage]
        encoder = [int(stage[1]) for stage in map(self._stage_keys.encoder.match, keys) if stage]
        return max(decoder or encoder, default=0)

    def _holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.source)


def prefix_tokens(state: dict[str, Tensor]) -> int:
    """Number of tokens that stand before those of the image."""
    return sum(value.shape[1] for key, value in state.items() if key.rpartition(".")[2] in PREFIX_TOKENS)


def _image_layers(target: nn.Module, family: Family | None) -> tuple[str, ...]:
    """Prefixes of the layers that read the image: those of the family, or else the first convolution."""
    if family is not None:
        return tuple(f"{name}." for name in (*family.image_layers, *family.image_skips))
    return tuple(f"{name}." for name, module in target.named_modules() if isinstance(module, _ConvNd))[:1]
