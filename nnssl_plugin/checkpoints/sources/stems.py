"""Networks with a stem for each dataset of their training, as MultiTalent's of nnU-Net v2: one of them is taken.

Its author says of ``MultiTalent_trainer_multistems`` that "it adds a stem for each dataset (key is the stem ID, value
are the stem weights)", and that one of them takes the place of the default one in fine-tuning (MIC-DKFZ/MultiTalent,
issues 20 and 19). Under which name they lie could not be read: whatever ends in ``stem`` or ``stems``, followed by an
ID and by the layers of a stem, is taken for them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from nnssl_plugin.checkpoints.sources.layouts import first_layer_channels, keys_of_network
from nnssl_plugin.checkpoints.sources.source import Source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some

ONE_OF_SEVERAL = re.compile(r"^(?:.*\.)?(?:\w+_)?stems?\.([^.]+)\.(convs\..+)$")
"""ID of a stem, and the name of a tensor within it."""
DEFAULT = "encoder.stem"
"""The stem of a ResidualEncoderUNet."""


def stems_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """ID of each stem → its input channels; empty for a network with one stem."""
    stems: dict[str, int] = {}
    for key, value in weights.items():
        found = ONE_OF_SEVERAL.match(key)
        if found and value.dim() in (4, 5):
            stems.setdefault(found[1], value.shape[1])
    return stems


def said(stems: Mapping[str, int]) -> list[str]:
    """Each stem with its channels, as a person would say it."""
    return [f"{name} ({channels} channel{'s' * (channels > 1)})" for name, channels in stems.items()]


def with_stem(source: Source, stem: str | None) -> Source:
    """The source with one stem in the place of the network's own.

    Args:
        source: what ``read_source`` gave; one with a single stem stays as it is.
        stem: ID of the stem; None where there is no choice.

    Raises:
        UserError: where there are several and none is named, or the named one is not there.
    """
    stems = stems_of(source.weights)
    if not stems and stem is None:
        return source
    if not stems:
        raise UserError(f"{source.path} has one stem, and none called {stem}.", "Leave --stem out.")
    if stem not in stems and (stem is not None or len(stems) > 1):
        raise UserError(
            f"{source.path} has a stem for each dataset of its training: {some(said(stems))}.",
            f"Name the one whose images are most like yours: --stem {next(iter(stems))} (inspect lists more)",
        )
    chosen = stem or next(iter(stems))
    place = keys_of_network(source.network).stem or DEFAULT
    weights = {}
    for key, value in source.weights.items():
        found = ONE_OF_SEVERAL.match(key)
        if found is None:
            weights[key] = value
        elif found[1] == chosen:
            weights[f"{place}.{found[2]}"] = value
    taken = [*source.provenance.get("taken", []), f"the stem {chosen}, one of {len(stems)}"]
    return replace(
        source,
        weights=weights,
        input_channels=first_layer_channels(weights, place),
        provenance=source.provenance | {"taken": taken},
    )
