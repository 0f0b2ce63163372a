"""Which of this package's tables (``--mapping``) fits weights whose keys tell nothing, or another network's."""

from collections.abc import Mapping

from torch import Tensor

from nnssl_plugin.checkpoints.format.provenance import as_architecture
from nnssl_plugin.checkpoints.format.tensors import parameters_in
from nnssl_plugin.checkpoints.sources.mappings import shipped_mappings
from nnssl_plugin.checkpoints.sources.source import Source, with_table
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.plans import build_described

NEARLY_ALL = 0.95
"""Fraction of the encoder's parameters, of the file's and of the network's, that must have their counterpart."""


def fitting_tables(source: Source) -> list[str]:
    """Names of the tables whose network's encoder the weights fill, and whose encoder takes all of theirs.

    Networks are built without memory; one whose package is not installed is left out.

    Args:
        source: what ``read_source`` gave for the file without a table.
    """
    return [name for name in shipped_mappings() if _fits(source, name)]


def _fits(source: Source, table: str) -> bool:
    try:
        mapped = with_table(source, table)
        if mapped.network is None or mapped.key_to_encoder is None:
            return False
        network = build_described(as_architecture(mapped.network), mapped.input_channels or 1, table)
    except UserError:
        return False
    theirs, ours = (_below(state, mapped.key_to_encoder) for state in (mapped.weights, network.state_dict()))
    common = {key: value for key, value in ours.items() if key in theirs and theirs[key].shape == value.shape}
    return _numbers(common) >= NEARLY_ALL * max(_numbers(ours), parameters_in(theirs))


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key.startswith(f"{prefix}.")}


def _numbers(weights: Mapping[str, Tensor]) -> int:
    """Floating-point numbers of a state dict on the meta device, whose tensors have no memory to be told apart by."""
    return sum(value.numel() for value in weights.values() if value.is_floating_point())
