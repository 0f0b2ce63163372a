"""Encoders in the names of the library that they come from, for its own models: a plain state dict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import family_of_class
from nnssl_plugin.nnunet.plans import resolve_configuration

RGB = 3
"""Channels that the libraries' own models read."""


@dataclass(frozen=True)
class Library:
    """Whose names an encoder of this package has, below a prefix."""

    name: str
    network: str
    """Family whose encoder is the library's."""
    prefix: str
    """Of the encoder's keys."""
    first_layer: str
    """Key of the layer that reads the image, in the library's names."""
    preset: str
    """Preset with such a network."""


TORCHVISION = Library("torchvision", "ResNetUNet", "encoder.", "conv1.weight", "resnet50-unet")
TIMM = Library("timm", "SAMUNet", "vit.", "patch_embed.proj.weight", "samvit-b-unet")


def weights_for(library: Library, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder of a pretraining under the library's keys.

    An encoder of one channel gets three, each with a third of its weights: of a grey image, shown in all three, it says
    the same. Other numbers of channels stay.

    Args:
        library: whose names are wanted.
        content: a checkpoint as ``export.shareable`` gives it.

    Raises:
        UserError: when the network is not one with that library's encoder.
    """
    arguments = content["init_args"]
    planned = resolve_configuration(arguments["plans"], arguments["configuration"])["architecture"]
    name = planned["network_class_name"].rpartition(".")[2]
    family = family_of_class(name)
    if family is None or family.name != library.network:
        raise UserError(
            f"The pretrained network is {name}, whose encoder is not {library.name}'s.",
            f"Pretrain {library.network} (nnssl_plugin plan --preset {library.preset}), or export in another format.",
        )
    weights = {
        key.removeprefix(library.prefix): tensor
        for key, tensor in content["network_weights"].items()
        if key.startswith(library.prefix)
    }
    first = weights[library.first_layer]
    if first.shape[1] == 1:
        weights[library.first_layer] = first.repeat(1, RGB, 1, 1) / RGB
    return weights
