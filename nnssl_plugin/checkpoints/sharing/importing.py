"""Shared weights → a checkpoint of plain types: the folder that ``export`` wrote, or a file that needs trust."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nnssl_plugin.checkpoints.format.files import (
    is_safetensors,
    read_checkpoint,
    read_safetensors,
    read_trusted,
    save_checkpoint,
    to_plain,
)
from nnssl_plugin.checkpoints.format.pickled import unsafe_globals
from nnssl_plugin.checkpoints.format.shared_folder import (
    read_shared_folder,
)
from nnssl_plugin.checkpoints.sources.nnssl_layout import with_nnssl_block
from nnssl_plugin.checkpoints.sources.source import source_of
from nnssl_plugin.checkpoints.sources.state_dicts import is_state_dict, refuse_version_1
from nnssl_plugin.errors import UserError

TRUST = "If you know and trust its author: nnssl_plugin import --trust {} -o NEW.pth"
SHOWN = 6
"""Names in a message."""
logger = logging.getLogger(__name__)


def import_weights(source: str | Path, target: str | Path, *, trust: bool = False) -> Path:
    """Write shared weights as a checkpoint that ``adapt`` and stock nnU-Net's ``-pretrained_weights`` read.

    Args:
        source: a folder that ``export`` wrote, or a file of weights.
        target: the checkpoint to write (``.pth``).
        trust: run the code that a pickled file asks for. Without it such a file is refused, naming what it would run.

    Raises:
        UserError: for a target that is there, a file that is not what its hash says, or one that needs trust.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise UserError(f"{target} is there already.", "Choose another file with -o, or remove this one.")
    if source.is_dir():
        content = read_shared_folder(source)
    elif is_safetensors(source):
        content, _ = read_safetensors(source)
    else:
        content = _plain_part(read_trusted(source)) if trust else _read_untrusted(source)
    content = {"network_weights": content} if is_state_dict(content) else content
    content = with_nnssl_block(content, source)  # what lies beside the file does not lie beside the new one
    refuse_version_1(source_of(content, source).weights, source)  # what adapt could not read is not written
    try:
        save_checkpoint(content, target)
    except TypeError as error:
        raise UserError(f"{source} cannot be written as a checkpoint: {error}.", TRUST.format(source)) from error
    return target


def _read_untrusted(path: Path) -> dict[str, Any]:
    """A file of plain tensors; for any other, the refusal names everything that it would call."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        called = unsafe_globals(path)
        if not called:
            raise
        shown = ", ".join(called[:SHOWN]) + (f" and {len(called) - SHOWN} more" if len(called) > SHOWN else "")
        raise UserError(
            f"{path} runs code when it is opened; it was not opened. It would call:\n  {shown}",
            TRUST.format(path),
        ) from error


def _plain_part(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries that a checkpoint can hold; modules give their weights, other objects are left out."""
    kept = {}
    for key, value in content.items():
        try:
            kept[str(key)] = to_plain(_state(value))
        except TypeError as error:
            logger.warning("Left out '%s': %s", key, error)
    return kept


def _state(value: Any) -> Any:
    return value.state_dict() if isinstance(value, nn.Module) else value
