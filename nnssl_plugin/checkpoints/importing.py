"""Shared weights → a checkpoint of plain types: the folder that ``export`` wrote, or a file that needs trust."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nnssl_plugin.checkpoints.files import (
    is_safetensors,
    read_checkpoint,
    read_safetensors,
    read_trusted,
    save_checkpoint,
    to_plain,
)
from nnssl_plugin.checkpoints.pickled import unsafe_globals
from nnssl_plugin.checkpoints.provenance import weights_hash
from nnssl_plugin.checkpoints.shared_folder import (
    ADAPTATION_PLAN,
    ALIASES,
    CARD,
    DATASET,
    HASHES,
    MODEL,
    PLANS,
    PROVENANCE,
    RUN,
    STATE,
    STATE_VALUES,
    decode,
    file_hash,
    read_folder_json,
)
from nnssl_plugin.checkpoints.state_dicts import is_state_dict
from nnssl_plugin.errors import UserError

SHOWN = 6
"""Names in a message."""
NEEDED = (MODEL, ALIASES, PLANS, DATASET, PROVENANCE, RUN)
DOWNLOAD_AGAIN = "Download or copy the folder again; do not use these weights."
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
    save_checkpoint(content, target)
    return target


def read_shared_folder(folder: str | Path) -> dict[str, Any]:
    """The checkpoint that a shared folder holds: every file verified, and the weights bit for bit.

    Raises:
        UserError: when a file is missing, not what its hash says, or the weights are not those of the provenance.
    """
    folder = Path(folder)
    hashes = read_folder_json(folder / HASHES)
    try:
        _verify_files(folder, hashes["files"])
        content = _content(folder, state=STATE_VALUES in hashes["files"], plan=ADAPTATION_PLAN in hashes["files"])
        recorded = (hashes["network_weights"], content["provenance"].get("weights_sha256"))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not laid out as nnssl_plugin exports it ({type(error).__name__}: {error}).",
                        DOWNLOAD_AGAIN) from error
    found = weights_hash(content["network_weights"])
    if any(said not in (None, found) for said in recorded):
        raise UserError(f"The weights in {folder / MODEL} are not those that were exported (their hash differs).",
                        DOWNLOAD_AGAIN)
    return content


def _content(folder: Path, *, state: bool, plan: bool) -> dict[str, Any]:
    """The checkpoint's entries; ``state`` and ``plan`` say whether the folder has the method's and nnssl's."""
    stored, _ = read_safetensors(folder / MODEL)
    run = decode(read_folder_json(folder / RUN), {})
    content = {
        "network_weights": {key: stored[name] for key, name in read_folder_json(folder / ALIASES).items()},
        "init_args": {"plans": read_folder_json(folder / PLANS), "configuration": run.pop("configuration"),
                      "fold": run.pop("fold"), "dataset_json": read_folder_json(folder / DATASET)},
        "provenance": read_folder_json(folder / PROVENANCE),
        **run,
    }
    if state:
        tensors, _ = read_safetensors(folder / STATE)
        content["ssl_state"] = decode(read_folder_json(folder / STATE_VALUES), tensors)
    if plan:
        content["nnssl_adaptation_plan"] = read_folder_json(folder / ADAPTATION_PLAN)
    return content


def _verify_files(folder: Path, listed: Mapping[str, str]) -> None:
    """Compare every listed file with its hash; the card is for people, who may have filled it in."""
    needed = (*NEEDED, STATE) if STATE_VALUES in listed else NEEDED
    missing = [name for name in needed if name not in listed]
    if missing:
        raise UserError(f"{folder / HASHES} does not list {missing[0]}: this is no folder of --format safetensors.",
                        "For a folder with a .pth file, name that file.")
    for name, digest in listed.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path} is missing.", DOWNLOAD_AGAIN)
        if file_hash(path) == digest:
            continue
        if name != CARD:
            raise UserError(f"{path} is not the file that was exported (its hash differs).", DOWNLOAD_AGAIN)
        logger.warning("%s was edited after the export.", path)


def _read_untrusted(path: Path) -> dict[str, Any]:
    """A file of plain tensors; for any other, the refusal names everything that it would call."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        called = unsafe_globals(path)
        if not called:
            raise
        shown = ", ".join(called[:SHOWN]) + (f" and {len(called) - SHOWN} more" if len(called) > SHOWN else "")
        raise UserError(f"{path} runs code when it is opened; it was not opened. It would call:\n  {shown}",
                        f"If you know and trust its author: nnssl_plugin import --trust {path} -o NEW.pth") from error


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
