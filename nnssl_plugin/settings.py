"""Settings of a plan's blocks: what the fields of a frozen dataclass take, and the one validator that reads them.

A field's annotation is the whole rule: ``Annotated[float, Range(gt=0)]``, ``Literal["mask", "none"]``, ``bool | None``,
``tuple[Count, Count, Count]``. What concerns several fields at once is checked in the dataclass's ``__post_init__``.
"""

import difflib
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from nnssl_plugin.errors import UserError

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a block of values"}
"""What a value of a type is called to users."""
LONGEST_SHOWN = 120
"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number: greater than ``gt``, at least ``ge``, less than ``lt``, at most ``le``."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def holds(self, value: float | None) -> bool:
        """Whether a number lies within the bounds; null, where the field takes it, has none."""
        if value is None:
            return True
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        low = self.ge if self.gt is None else self.gt
        high = self.le if self.lt is None else self.lt
        if low is None:
            return f"{'up to' if self.lt is None else 'below'} {high:g}"
        if high is None:
            return f"{'from' if self.gt is None else 'above'} {low:g}"
        return f"in {'[' if self.gt is None else '('}{low:g}, {high:g}{']' if self.lt is None else ')'}"


Count = Annotated[int, Range(ge=1)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]


def settings_from(block: Any, default: Any, where: str, *, set_as: str = "", elsewhere: Iterable[str] = ()) -> Any:
    """A frozen settings dataclass from the plan's JSON: the defaults with the values of ``block``.

    Args:
        block: names and values as JSON gives them.
        default: the settings that hold where the block says nothing.
        where: what the block is called in errors.
        set_as: what stands before a name in ``nnssl_plugin plan --set`` (``finetuning.``).
        elsewhere: names that ``--set`` takes for other blocks, for the suggestion where a name is unknown here.

    Raises:
        UserError: for a block that is none, a setting that does not exist, a value that the setting does not take, or
            settings that contradict one another.
    """
    if not isinstance(block, Mapping):
        raise UserError(f"{where[:1].upper()}{where[1:]} is {_shown(block)}; expected a block of settings.", _mend())
    annotations = get_type_hints(type(default), include_extras=True)
    values = {field.name: getattr(default, field.name) for field in fields(default)}
    for name, value in block.items():
        if name not in values:
            close = closest(name, [*(f"{set_as}{known}" for known in values), *elsewhere])
            raise UserError(
                f"Unknown setting '{name}' in {where}" + (f"; did you mean '{close}'?" if close else "."),
                f"Known settings: {', '.join(values)}.",
            )
        try:
            values[name] = converted(value, annotations[name])
        except ValueError as error:
            raise UserError(
                f"Setting '{name}' in {where} is {_shown(value)}; expected {described(annotations[name])}.",
                _mend(f"{set_as}{name}", _fitting(value, annotations[name], values[name])),
            ) from error
    return type(default)(**values)


def converted(value: Any, annotation: Any) -> Any:
    """A value read from JSON as a field takes it: whole numbers serve as float, lists as tuple, true is no number.

    Raises:
        ValueError: when the annotation does not allow the value; NaN and infinity are no numbers.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        result = converted(value, parts[0])
        return _require(result, all(limit.holds(result) for limit in parts[1:]))
    if origin in (Union, UnionType):
        for option in parts:
            with suppress(ValueError):
                return converted(value, option)
        raise ValueError(value)
    if origin is Literal:
        return _require(value, any(type(value) is type(option) and value == option for option in parts))
    if origin is tuple:
        return _converted_list(value, parts)
    if is_dataclass(annotation):
        return _converted_block(value, annotation)
    if annotation is float:
        number = _require(value, type(value) in (int, float) and abs(value) < math.inf)
        with suppress(OverflowError):
            return float(number)
        raise ValueError(value)
    return _require(value, annotation is Any or type(value) is (origin or annotation))


def described(annotation: Any) -> str:
    """What a field takes, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([described(parts[0]), *map(str, parts[1:])])
    if origin in (Union, UnionType):
        return " or ".join(map(described, parts))
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if is_dataclass(annotation):
        return f"a block of {', '.join(field.name for field in fields(annotation))}"
    if origin is not tuple:
        return "null" if annotation is NoneType else NAMES.get(origin or annotation, str(annotation))
    if parts[-1] is ...:
        return f"a list, each entry {described(parts[0])}"
    if len(set(parts)) == 1:
        return f"a list of {len(parts)}, each {described(parts[0])}"
    return f"a list of {', '.join(map(described, parts))}"


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option whose last part (after the last dot) is most like ``name``; the first of several."""
    by_last_part = {option.rpartition(".")[2]: option for option in reversed(list(options))}
    near = difflib.get_close_matches(str(name), by_last_part, 1)
    return by_last_part[near[0]] if near else None


def with_brackets(value: Any, annotation: Any) -> Any:
    """The list that a text without brackets means (``32,40,32``).

    Raises:
        ValueError: when it is none that the annotation allows.
    """
    text = _require(value, isinstance(value, str))
    for read in (lambda: json.loads(f"[{text}]"), lambda: [part.strip() for part in text.split(",")]):
        with suppress(ValueError):
            listed = read()
            converted(listed, annotation)
            return listed
    raise ValueError(value)


def assignment(name: str, value: Any) -> str:
    """``name=value`` as a shell takes it."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return shlex.quote(f"{name}={text}")


def _converted_list(value: Any, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(value, isinstance(value, list | tuple))
    entries = parts[:1] * len(value) if parts[-1] is ... else parts
    _require(value, len(entries) == len(value))
    return tuple(map(converted, value, entries))


def _converted_block(value: Any, settings: Any) -> Any:
    _require(value, isinstance(value, Mapping))
    annotations = get_type_hints(settings, include_extras=True)
    needed = {field.name for field in fields(settings) if field.default is MISSING}
    _require(value, needed <= value.keys() <= annotations.keys())
    return settings(**{name: converted(entry, annotations[name]) for name, entry in value.items()})


def _require(value: Any, allowed: bool) -> Any:
    if not allowed:
        raise ValueError(value)
    return value


def _fitting(value: Any, annotation: Any, default: Any) -> Any:
    """A value for the remedy: the list that was meant, else the default."""
    with suppress(ValueError):
        return with_brackets(value, annotation)
    return default


def _mend(name: str = "NAME", value: Any = "VALUE") -> str:
    return f"For example: nnssl_plugin plan -d ID -p PLANS -n NAME --set {assignment(name, value)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " …"
