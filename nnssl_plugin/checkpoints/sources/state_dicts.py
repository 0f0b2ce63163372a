"""Finding the state dict in a file: the usual wrappers around it, and the usual prefixes before its keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_plugin.errors import UserError

WRAPPERS = ("network_weights", "state_dict", "model_state_dict", "model", "net", "network")
"""Entries under which training programs store the weights."""
NNUNET = WRAPPERS[0]
"""The name that nnU-Net and this package give them, which counts before the others."""
PARTS = ("backbone", "teacher", "student")
"""First parts of keys, or entries, that hold the network among other things; the first one that is there is taken.

A backbone beside a teacher and a student is the network, and they are its heads; a teacher is the average of its
student, which is what the methods that have one hand out.
"""
PREFIXES = ("module", "model", "net", "network")
"""First parts of keys that training programs put before those of the network, at any depth."""
DEPTH = 4
"""Wrappers within wrappers that are opened."""
VERSION_1 = re.compile(r"(?:module\.)?(?:conv_blocks_context|conv_blocks_localization|tu|seg_outputs)\.\d+\.")
"""Keys of nnU-Net v1's ``Generic_UNet``."""
SHOWN = 8
"""Names in a message."""


def is_state_dict(value: Any) -> bool:
    """Whether a value maps names to tensors and holds nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def find_state_dict(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The one state dict in a file, and a line for each choice that was made.

    Raises:
        UserError: when there is none, or several of equal right; the message names what is there.
    """
    place: Mapping[str, Any] = content
    notes: list[str] = []
    for _ in range(DEPTH):
        if _mostly_tensors(place):
            return _tensors_of(place, notes), notes
        name = _wrapper(place, path)
        notes.append(f"the entry '{name}'")
        others = [part for part in (*WRAPPERS, *PARTS) if part != name and _holds_tensors(place.get(part))]
        if others:
            notes.append(f"'{name}' was taken, {_listed(others)} left out")
        place = place[name]
    raise _nothing(content, path)


def without_wrapping(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The same tensors without the names that data-parallel wrappers and ``torch.compile`` add.

    Raises:
        UserError: when two keys would become one.
    """
    notes = []
    compiled = _renamed(weights, {key: key.replace("_orig_mod.", "") for key in weights}, path)
    if compiled.keys() != weights.keys():
        notes.append("without '_orig_mod.'")
    plain = _renamed(compiled, {key: key.removeprefix("module.") for key in compiled}, path)
    if plain.keys() != compiled.keys():
        notes.append("without 'module.'")
    return plain, notes


def the_network(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the network among those of a pretraining model, without their prefix (see :data:`PARTS`)."""
    notes = []
    weights = dict(weights)
    while True:
        first = {key.partition(".")[0] for key in weights if "." in key}
        part = next((part for part in (*PREFIXES, *PARTS) if part in first), None)
        if part is None:
            return weights, notes
        kept = {key[len(part) + 1 :]: value for key, value in weights.items() if key.startswith(f"{part}.")}
        notes.append(f"without '{part}.'")
        if len(kept) < len(weights):
            left = sorted({key.partition(".")[0] for key in weights} - {part})
            notes.append(f"'{part}.' was taken, {_listed(left)} left out ({len(weights) - len(kept)} tensors)")
        weights = kept


def refuse_version_1(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of nnU-Net v1.

    Raises:
        UserError: when the keys are those of its network.
    """
    if weights and sum(VERSION_1.match(key) is not None for key in weights) > len(weights) / 2:
        raise UserError(
            f"{path} is a checkpoint of nnU-Net v1, whose network (Generic_UNet) v2 does not have; its first keys: "
            f"{_listed(list(weights)[:3])}.",
            "Train again with nnU-Net v2, or rename the keys with a table of your own: --mapping TABLE "
            "(docs/reference/weight-sources.md).",
        )


def _mostly_tensors(place: Mapping[str, Any]) -> bool:
    tensors = sum(isinstance(value, Tensor) for value in place.values())
    return tensors > len(place) / 2 and all(isinstance(key, str) for key in place)


def _tensors_of(place: Mapping[str, Any], notes: list[str]) -> dict[str, Tensor]:
    weights = {key: value for key, value in place.items() if isinstance(value, Tensor)}
    if len(weights) < len(place):
        notes.append(f"{_listed([key for key in place if key not in weights])} left out: not tensors")
    return weights


def _wrapper(place: Mapping[str, Any], path: Path) -> str:
    """The entry in which the weights lie."""
    found = [name for name in WRAPPERS if _holds_tensors(place.get(name))]
    if len(found) > 1 and found[0] != NNUNET:
        raise UserError(
            f"{path} holds weights under {_listed(found)}.",
            "Save the one that you mean alone: torch.save({'state_dict': content[NAME]}, FILE)",
        )
    parts = [name for name in PARTS if _holds_tensors(place.get(name))]
    if not found and not parts:
        raise _nothing(place, path)
    return (found + parts)[0]


def _holds_tensors(value: Any, depth: int = DEPTH) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(entry, Tensor) or _holds_tensors(entry, depth - 1) for entry in value.values())


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if names[key] in renamed:
            raise UserError(
                f"{path} holds the tensor {names[key]} twice, with a prefix and without ({key}).",
                "Save one network's state dict alone.",
            )
        renamed[names[key]] = value
    return renamed


def _nothing(place: Mapping[str, Any], path: Path) -> UserError:
    return UserError(
        f"{path} holds no weights that could be found; its entries: {_listed(list(place)) or 'none'}.",
        "Save the state dict alone, torch.save({'state_dict': network.state_dict()}, FILE), or give a checkpoint of "
        "nnU-Net, nnssl or this package.",
    )


def _listed(names: list[Any]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
