"""Families of networks: one object that says everything the package knows of each, and the look-up of a family.

A family is one file of ``networks/families``, with a reader and ``FAMILIES``; a network outside this package is added
by :func:`register`. Nothing else names a family of networks.
"""

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks import families


@dataclass(frozen=True)
class Parts:
    """The parameters of a network from the image to the classes, each in one part; the decoder is the rest."""

    stages: list[list[nn.Parameter]]
    """Of the encoder, shallow to deep; what comes before the first stage counts to it."""
    stage_name: str
    head: list[nn.Parameter]
    """Of the last layers, one output per class."""
    rest_name: str = "decoder"
    """What lies outside the stages: the decoder with the head, in a classifier the head alone."""


class Reader(Protocol):
    """Where the features, the decoder and the parts of one network are; stages are ordered fine to coarse."""

    channels: tuple[int, ...]
    """Of each stage of the encoder."""
    dimensions: int
    """Spatial ones, 2 or 3."""
    strides: tuple[tuple[int, ...], ...]
    """Voxels from one token of a stage to the next, per axis."""
    offsets: tuple[tuple[float, ...], ...]
    """Centre of the first token of a stage, in voxels per axis (see ``TokenGrid``)."""
    prefixes: tuple[str, ...]
    """Prefixes of the keys that a pretraining may train: everything but the segmentation layers."""
    encoder_prefixes: tuple[str, ...]
    """Prefixes of the encoder's keys, of which a tensor has one at least."""
    head_prefixes: tuple[str, ...]
    """Prefixes of the keys of the layers that give the classes."""
    planned_grid: tuple[int, ...] | None
    """Tokens per axis that the network's positions were made for; ``None`` where it has none or does not tell."""

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps (B, channels[s], *spatial / strides[s]) of an image (B, C, *spatial)."""
        ...

    def on_bottleneck(self, see: Callable[[Tensor], None]) -> None:
        """Let ``see`` have the encoder's deepest output at every pass of the network, of ``features`` too."""
        ...

    def decode(self, features: Sequence[Tensor], skips: bool) -> Tensor:
        """The map before the segmentation layer; without ``skips`` every skip connection is zero."""
        ...

    def image_layer(self, input_channels: int) -> nn.Module:
        """A fresh layer from what ``decode`` gives to an image."""
        ...

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder."""
        ...

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder without its segmentation layers."""
        ...

    def parts(self) -> Parts:
        """Encoder stages and head, for recipes of fine-tuning."""
        ...

    def compiled(self) -> list[nn.Module]:
        """Modules that are worth compiling one by one."""
        ...


@runtime_checkable
class TokenReader(Protocol):
    """What the reader of a transformer over patches offers beside :class:`Reader`."""

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, K, C) of the patches ``keep`` (B, K) of an image (B, C, *spatial), encoded without the others."""
        ...

    def token_decoder(self, blocks: int) -> nn.Module:
        """Fresh transformer blocks: called with the tokens (B, N, C) of a whole grid and its counts, give as many."""
        ...


@runtime_checkable
class SummaryReader(Protocol):
    """What the reader of a network that may have a summary token offers beside :class:`Reader`."""

    has_summary: bool
    """Whether this network has one."""

    def summarised(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The summary token (B, C) of an image, and what ``features`` gives, by one pass."""
        ...


@runtime_checkable
class RecomputedReader(Protocol):
    """What the reader of a network offers beside :class:`Reader`, whose parts may forget their activations."""

    def recomputed(self) -> list[nn.Module]:
        """Modules that compute their activations again in the backward pass, one by one."""
        ...


@dataclass(frozen=True)
class StageKeys:
    """How keys of a state dict number the stages, for networks that may differ in the number of them.

    Stages of the encoder are counted from the finest, those of the decoder from the coarsest.
    """

    encoder: re.Pattern[str]
    """Its first group is the number of an encoder stage."""
    decoder: re.Pattern[str]
    """Its first group is the number of a decoder stage."""
    concatenated: re.Pattern[str]
    """Layers of the decoder that read the upsampled map and the skip connection, concatenated in equal parts."""
    skip: re.Pattern[str]
    """Its first group, 0 or 1, is the place of a skip's projection, which depends on the block's stride."""


def no_divisor(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    """Any patch size will do."""
    return [1] * dimensions


def product_of_strides(arguments: Mapping[str, Any], dimensions: int) -> list[int]:
    """The product of the ``strides`` of all stages, per axis."""
    stages = [[stride] * dimensions if isinstance(stride, int) else stride for stride in arguments["strides"]]
    return [math.prod(axis) for axis in zip(*stages, strict=True)]


@dataclass(frozen=True)
class Family:
    """Everything that is known of a family of networks."""

    name: str
    classes: str
    """Regular expression that the name of the class fits, without its module."""
    marker: str
    """Part of a key of the state dict that no other family has."""
    recognises: Callable[[nn.Module], bool]
    """Whether a bare network is of this family."""
    reader: Callable[[nn.Module], Reader]
    encoder: str
    """Key of the encoder in the state dict, as MIC-DKFZ/nnssl names it (``key_to_encoder``)."""
    stem: str
    """Key of the first layers (``key_to_stem``)."""
    image_layers: tuple[str, ...]
    """Keys of the layers that read the image, with their aliases (``keys_to_in_proj``)."""
    available: str
    """Where a user gets a plan with such a network."""
    image_skips: tuple[str, ...] = ()
    """Keys of residual skips that read the image too."""
    positions: str | None = None
    """Key of the learned positional embedding (``key_to_lpe``)."""
    block_key: re.Pattern[str] = re.compile(r"\b(?:convs|blocks)\.(\d+)\.")
    """Finds a block within its stage in a key; the first group is its number."""
    stage_keys: StageKeys | None = None
    """``None`` for networks whose stages are matched by their keys alone."""
    divisors: Callable[[Mapping[str, Any], int], list[int]] = field(default=no_divisor)
    """What the patch must be divisible by per axis, from the arguments of the class and the number of axes."""
    deep_supervision: bool = False
    """Whether the class takes ``deep_supervision``."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """That of nnU-Net's own trainer for such networks."""


_REGISTERED: list[Family] = []


def register(family: Family) -> None:
    """Add a family of networks that lives outside this package; it is looked at before those of the package."""
    _REGISTERED.append(family)


def all_families() -> tuple[Family, ...]:
    """Every known family."""
    return (*_REGISTERED, *_of_package())


def family_of(network: nn.Module) -> Family | None:
    """The family of a bare network; ``None`` for a network of no known one."""
    return next((family for family in all_families() if family.recognises(network)), None)


def family_of_class(name: str) -> Family | None:
    """The family of a class by its name, dotted or not, as plans give it; ``None`` where it is not known."""
    name = name.rpartition(".")[2]
    return next((family for family in all_families() if re.fullmatch(family.classes, name)), None)


def family_of_keys(keys: Iterable[str]) -> Family | None:
    """The family that the keys of a state dict belong to; ``None`` where they tell none."""
    keys = list(keys)
    return next((family for family in all_families() if any(family.marker in key for key in keys)), None)


def known_family_of(network: nn.Module) -> Family:
    """The family of a bare network.

    Raises:
        UserError: for a network of no known family.
    """
    family = family_of(network)
    if family is None:
        known = ", ".join(f"{family.name} ({family.available})" for family in all_families())
        raise UserError(
            f"{type(network).__name__} is not a network that pretraining can read.",
            f"Use a plan with one of: {known}.",
        )
    return family


def reader_of(network: nn.Module) -> Reader:
    """The reader of a bare network.

    Raises:
        UserError: for a network of no known family.
    """
    return known_family_of(network).reader(network)


def parts_of(network: nn.Module) -> Parts | None:
    """The parts of a bare network; ``None`` for a network of no known family."""
    family = family_of(network)
    return None if family is None else family.reader(network).parts()


@cache
def _of_package() -> tuple[Family, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(family for name in names for family in importlib.import_module(f"{families.__name__}.{name}").FAMILIES)
