"""Reading settings: a frozen dataclass from the JSON of a plan, every value checked."""

from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin

from nnssl_plugin.errors import UserError


def settings_from(block: dict[str, Any], default: Any, where: str) -> Any:
    """A frozen settings dataclass from the plan's JSON: the defaults with the values of ``block``.

    Raises:
        UserError: for a key that the settings do not have, or a value of the wrong type.
    """
    known = {f.name: f for f in fields(default)}
    for key, value in block.items():
        if key not in known:
            raise UserError(f"Unknown setting '{key}' in {where}.", f"Known settings: {', '.join(known)}.")
        # a field whose default is None says itself what it takes, in its dataclass
        if getattr(default, key) is not None and not _fits(value, known[key].type):
            expected = getattr(known[key].type, "__name__", known[key].type)
            raise UserError(f"Setting '{key}' in {where} is {value!r}; expected {expected}.")
    values = {f: getattr(default, f) for f in known} | block
    return type(default)(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value read from JSON is of a field's declared type; whole numbers serve as float, lists as tuple."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = tuple(get_origin(option) or option for option in options)
    if isinstance(value, bool):  # bool is an int to isinstance
        return bool in kinds
    widened = {int: float, list: tuple}.get(type(value))
    return isinstance(value, kinds) or widened in kinds
