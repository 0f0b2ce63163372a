"""Which classes a description of a network may name: checked before anything that a file names is looked up or built.

A plan, and the description in a checkpoint, name classes by dotted names, which nnU-Net locates and calls: without
this check a file of plain tensors could run any function that is installed.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some
from nnssl_plugin.networks.family import family_of_class

NETWORK = re.compile(r"(?:dynamic_network_architectures\.architectures|nnssl_plugin\.networks)\.\w+\.\w+")
"""A network of the packages that networks come from."""
LAYER = re.compile(r"(torch\.nn(?:\.modules(?:\.\w+)?)?)\.(\w+)")
LAYERS = ("conv", "instancenorm", "batchnorm", "normalization", "dropout", "activation", "pooling")
"""Modules of ``torch.nn.modules`` whose classes may be named: convolutions, normalisations, dropout, non-linearities
and pooling."""
INITIALISER = re.compile(r"torch\.nn\.init\.(\w+_)")
BLOCKS = (
    "dynamic_network_architectures.building_blocks.residual.BasicBlockD",
    "dynamic_network_architectures.building_blocks.residual.BottleneckD",
    "dynamic_network_architectures.building_blocks.patch_encode_decode.LayerNormNd",
    "dynamic_network_architectures.initialization.weight_init.InitWeights_He",
    "dynamic_network_architectures.initialization.weight_init.InitWeights_XavierUniform",
)
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
LARGEST = 2**16
"""Of the whole numbers in a network's arguments: features, sizes, tokens per axis."""
MOST_LAYERS = 1000
"""Of the same kind in a stage or network, by the arguments of :data:`COUNTS`."""
COUNTS = re.compile(r"n_\w+|depths?|\w+_depth")
TRUST = "If you know and trust where it comes from, add --trust."


def check_architecture(architecture: Any, whose: str, *, trust: bool = False) -> None:
    """Refuse the description of a network that names anything but networks, layers and initialisers.

    Args:
        architecture: a plan's ``architecture``: ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``.
        whose: whose network it is, for messages, such as a file.
        trust: the user vouches for it: names are not checked, its form and its numbers are.

    Raises:
        UserError: naming what is not allowed; nothing was looked up.
    """
    _check_form(architecture, whose)
    unknown = [] if trust else unknown_names(architecture)
    if unknown:
        raise UserError(
            f"The network of {whose} names {some(unknown)}, which is no network, layer or initialiser of this "
            "package, of dynamic_network_architectures or of PyTorch; nothing of it was run.",
            TRUST,
        )


def unknown_names(architecture: Mapping[str, Any]) -> list[str]:
    """The names in a plan's ``architecture`` that may not be looked up, each once."""
    name, arguments = architecture["network_class_name"], architecture["arch_kwargs"]
    imported = [arguments.get(key) for key in architecture.get("_kw_requires_import", ())]
    layers = [*(value for value in imported if isinstance(value, str)), *filter(DOTTED.fullmatch, _texts(arguments))]
    return list(dict.fromkeys([*([] if is_network(name) else [name]), *(n for n in layers if not is_layer(n))]))


def is_network(name: str) -> bool:
    """Whether a dotted name is a network of this package or of dynamic_network_architectures, or one of a known family
    that is imported already (``networks.family.register``)."""
    module, _, class_name = name.rpartition(".")
    if NETWORK.fullmatch(name):
        try:
            importlib.import_module(module)
        except ImportError:
            return False
    elif family_of_class(class_name) is None:
        return False
    located = getattr(sys.modules.get(module), class_name, None)
    return inspect.isclass(located) and issubclass(located, nn.Module)


def is_layer(name: str) -> bool:
    """Whether a dotted name is a layer or an initialiser that a network may be made of."""
    if name in BLOCKS:
        return True
    if initialiser := INITIALISER.fullmatch(name):
        return hasattr(torch.nn.init, initialiser[1])
    found = LAYER.fullmatch(name)
    located = getattr(nn, found[2], None) if found else None
    if not inspect.isclass(located) or not issubclass(located, nn.Module):
        return False
    home = located.__module__
    return home in {f"torch.nn.modules.{kind}" for kind in LAYERS} and found[1] in (
        "torch.nn",
        "torch.nn.modules",
        home,
    )


def _check_form(architecture: Any, whose: str) -> None:
    if not isinstance(architecture, Mapping):
        raise _malformed(whose, "its architecture is not a block of values")
    arguments, imported = architecture.get("arch_kwargs"), architecture.get("_kw_requires_import", [])
    if not isinstance(architecture.get("network_class_name"), str):
        raise _malformed(whose, "network_class_name is not a name")
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise _malformed(whose, "arch_kwargs is not a block of named values")
    if not isinstance(imported, (list, tuple)) or not all(isinstance(key, str) for key in imported):
        raise _malformed(whose, "_kw_requires_import is not a list of names of arguments")
    for key in imported:
        if not isinstance(arguments.get(key), str | None):
            raise _malformed(whose, f"{key} is not the name of a class")
    for name, number in _numbers(arguments):
        if abs(number) > (MOST_LAYERS if COUNTS.fullmatch(name) else LARGEST):
            raise _malformed(whose, f"{name} holds {number:.6g}")


def _malformed(whose: str, reason: str) -> UserError:
    return UserError(
        f"The network of {whose} cannot be built: {reason}.",
        "Restore the file, or set it by hand: nnssl_plugin plan --set configurations.CONFIG.architecture.…",
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested arguments, with the name of its argument."""
    if isinstance(value, (int, float)):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(entry, str(key))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _numbers(entry, name)
