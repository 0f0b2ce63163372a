"""What a file may say of its weights: the type and range of every field, checked before anything uses it."""

from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.checkpoints.format.provenance import datasets_of
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.plans import UNBUILDABLE, resolve_configuration

LARGEST = 2**16
"""Of a patch, in voxels per axis."""
INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
"""Of what nnU-Net's plan holds per CT channel, what is compared."""
Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, (list, tuple)) and all(map(test, value))


def _whole(value: Any, least: int = 0, most: float = 2**63) -> bool:
    return _number(value) and least <= value <= most and float(value).is_integer()


def _size(value: Any) -> bool:
    return _whole(value, 1, LARGEST)


def _millimetres(value: Any) -> bool:
    return value is None or (_number(value) and value > 0)


def _number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return abs(float(value)) < 1e300
    except OverflowError:  # a whole number beyond all floats
        return False


def _block(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _count(value: Any) -> bool:
    return _whole(value)


def _order(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_whole, value)) and sorted(value) == list(range(len(value)))


def _network(value: Any) -> bool:
    return isinstance(value, Mapping) and _text(value.get("class")) and _block(value.get("kwargs"))


PROVENANCE: dict[str, tuple[Test, str]] = {
    **dict.fromkeys(
        (
            "method",
            "date",
            "plans_name",
            "configuration",
            "reader",
            "orientation",
            "weights_sha256",
            "checkpoint",
            "kind",
        ),
        (_text, "a text"),
    ),
    **dict.fromkeys(("channels", "normalisation", "trained", "taken"), (_list_of(_text), "a list of texts")),
    **dict.fromkeys(("settings", "training", "packages", "continued_from", "teacher"), (_block, "a block of values")),
    "data": (lambda value: _block(value) or _list_of(_block)(value), "a block of values, or a list of them"),
    "licence": (lambda value: _text(value) or _list_of(_text)(value), "a text, or a list of texts"),
    "citations": (lambda value: _text(value) or _list_of(lambda entry: _text(entry) or _block(entry))(value), "texts"),
    "spacing_mm": (_list_of(_millimetres), "a list of millimetres"),
    "patch_size": (_list_of(_size), "a list of voxels per axis"),
    "transpose_forward": (_order, "an order of axes"),
    "network_channels": (lambda value: _whole(value, 1, LARGEST), "a number of channels"),
    "native_spacing": (lambda value: isinstance(value, bool), "true or false"),
    "steps": (_count, "a number of steps"),
    "network": (_network, "a class with its arguments"),
}
"""Field of a provenance → what it must hold, where it is there and not null; other fields are free."""
ORIGINS = ("continued_from", "teacher")
"""Fields of a provenance that hold what is repeated of another one."""
DATA = {
    **dict.fromkeys(("dataset", "licence"), (_text, "a text")),
    "cases": (_count, "a number of cases"),
    "channels": (_list_of(_text), "a list of texts"),
}
NNSSL = {
    **dict.fromkeys(("key_to_encoder", "key_to_stem", "key_to_lpe"), (_text, "a text")),
    **dict.fromkeys(("architecture_plans", "pretrain_plan"), (_block, "a block of values")),
    "recommended_downstream_patchsize": (_list_of(_size), "a list of voxels per axis"),
    "pretrain_num_input_channels": (lambda value: _whole(value, 1, LARGEST), "a number of channels"),
}
"""Field of nnssl's adaptation plan → what it must hold."""
ENTRIES = {
    "nnssl_adaptation_plan": (_block, "a block of values"),
    "trainer_name": (_text, "a text"),
    "init_args": (_block, "a block of values"),
    "adaptation": (_block, "a block of values"),
    "citations": (PROVENANCE["citations"][0], "texts"),
}
"""Entry of a checkpoint → what it must hold."""


def plain(value: Any, path: Path, place: str) -> Any:
    """A description as JSON would hold it, its tuples aside: NumPy's numbers and arrays become Python's.

    Raises:
        UserError: for tensors and anything else that is no text, number, list or block.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(entry, path, f"{place}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry, path, f"{place}[{number}]") for number, entry in enumerate(value))
    raise unreadable(path, f"{place} is a {type(value).__name__}")


def check_provenance(provenance: Mapping[str, Any], path: Path, place: str = "provenance") -> None:
    """Refuse a provenance with a field of another type or range.

    Raises:
        UserError: naming the field.
    """
    check_fields(provenance, PROVENANCE, path, place)
    for data in datasets_of(provenance):
        check_fields(data, DATA, path, f"{place}.data")
    for field in ORIGINS:
        if provenance.get(field):
            check_provenance(provenance[field], path, f"{place}.{field}")


def check_fields(block: Mapping[str, Any], fields: Mapping[str, tuple[Test, str]], path: Path, place: str) -> None:
    """Refuse a block with a field of another type or range; fields that are absent or null are not looked at.

    Raises:
        UserError: naming the field.
    """
    for name, (test, expected) in fields.items():
        if block.get(name) is not None and not test(block[name]):
            raise unreadable(path, f"{place}{'.' if place else ''}{name} is not {expected}")


def check_plan(plans: Any, configuration: Any, path: Path) -> None:
    """Refuse a checkpoint's plan of nnU-Net of which something that is read is missing or of another type.

    Raises:
        UserError: naming the field.
    """
    if not _block(plans) or not _text(configuration):
        raise unreadable(path, "its plan is not a block of values with the name of a configuration")
    try:
        resolved = resolve_configuration(plans, configuration)
    except (*UNBUILDABLE, RecursionError) as error:
        raise unreadable(path, f"its plan has no usable configuration {configuration} ({error})") from error
    read = {
        "patch_size": (_list_of(_size), "a list of voxels per axis"),
        "spacing": (_list_of(_millimetres), "a list of millimetres"),
        "normalization_schemes": (_list_of(_text), "a list of texts"),
        "use_mask_for_norm": (_list_of(lambda value: isinstance(value, bool)), "a list of true and false"),
        "architecture": (_block, "a block of values"),
    }
    check_fields(resolved, read, path, f"plans.configurations.{configuration}")
    whole = {"plans_name": (_text, "a text"), "foreground_intensity_properties_per_channel": (_intensities, "numbers")}
    check_fields(plans, whole, path, "plans")


def _intensities(value: Any) -> bool:
    if not _block(value) or not all(key.isdigit() for key in value):
        return False
    return all(
        isinstance(channel, Mapping)
        and all(_number(channel[name]) for name in INTENSITIES if name in channel)
        and channel.get("std", 1) > 0
        for channel in value.values()
    )


def unreadable(path: Path, reason: str) -> UserError:
    """The error for a description that cannot be read."""
    return UserError(
        f"{path} has weights, and a description of them that cannot be read: {reason}.",
        "Save the weights alone, torch.save({'state_dict': content['network_weights']}, FILE), and read "
        "them with a mapping.",
    )
