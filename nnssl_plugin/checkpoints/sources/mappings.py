"""Tables that say how the keys of foreign weights are renamed, and what those weights were trained on.

A table is a JSON file; the field by field reference is ``docs/reference/weight-sources.md``.
"""

import re
from collections.abc import Mapping as MappingType
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json

FORMAT = 1
"""Version of the layout of a table."""
FOLDER = "tables"
"""Package data beside this module."""
SHOWN = 5
"""Keys in a message."""
TEXTS = ("name", "licence", "citation", "source")
LISTS = ("rename", "drop", "normalisation", "channels", "spacing_mm")
REFERENCE = "The fields are explained in docs/reference/weight-sources.md."


@dataclass(frozen=True)
class Mapping:
    """One table; its fields are those of the JSON file."""

    name: str
    format: int = FORMAT
    licence: str = ""
    citation: str = ""
    source: str = ""
    """Where the layout can be read."""
    network: dict[str, Any] | None = None
    """``{"class": dotted name, "kwargs": {…}}`` of the network that the new names belong to."""
    rename: tuple[tuple[re.Pattern, str], ...] = ()
    """Regular expression → replacement, applied to every key, one after the other."""
    drop: tuple[re.Pattern, ...] = ()
    """Keys in which one of these is found are left out, before any is renamed."""
    normalisation: tuple[str, ...] = ()
    """Per channel, in nnU-Net's names."""
    channels: tuple[str, ...] = ()
    spacing_mm: tuple[float, ...] = ()

    def apply(self, weights: MappingType[str, Tensor], path: Path, *, encoder: str | None) -> dict[str, Tensor]:
        """The weights under their new keys; tensors are not copied.

        Args:
            weights: what the file holds.
            path: the file, for messages.
            encoder: prefix of the encoder in the new names, where it is known: something must end up below it.

        Raises:
            UserError: when the table matches nothing, leaves nothing, or gives two tensors the same key.
        """
        kept = {key: value for key, value in weights.items() if not any(rule.search(key) for rule in self.drop)}
        renamed: dict[str, Tensor] = {}
        for key, value in kept.items():
            name = self._renamed(key)
            if name in renamed:
                raise UserError(
                    f"The table '{self.name}' gives two tensors of {path} the key {name} (one is {key}).",
                    "Make its rules more specific, or drop one of the two.",
                )
            renamed[name] = value
        rules = self.rename or self.drop
        matched = len(kept) < len(weights) or renamed.keys() != kept.keys()
        if encoder is not None:
            matched = any(key.startswith(f"{encoder}.") for key in renamed)
        if not renamed or (not matched and (rules or encoder)):
            first = ", ".join([*weights][:SHOWN])
            raise UserError(
                f"The table '{self.name}' does not fit {path}: {self._missing(encoder)}. Its first keys: {first}.",
                "Choose another table, or write one for these keys (docs/reference/weight-sources.md).",
            )
        return renamed

    def facts(self) -> dict[str, Any]:
        """What the table states, in the fields of ``provenance.describe_pretraining``."""
        stated = {
            "method": self.name,
            "licence": self.licence,
            "citations": [self.citation] if self.citation else [],
            "normalisation": list(self.normalisation),
            "channels": list(self.channels),
            "spacing_mm": list(self.spacing_mm),
        }
        return {name: value for name, value in stated.items() if value}

    def _missing(self, encoder: str | None) -> str:
        if encoder:
            return f"no tensor ends up below '{encoder}.'"
        return "none of its rules matches a key, or all are dropped"

    def _renamed(self, key: str) -> str:
        for pattern, replacement in self.rename:
            key = pattern.sub(replacement, key)
        return key


def shipped_mappings() -> list[str]:
    """Names of the tables in this package."""
    folder = resources.files("nnssl_plugin.checkpoints.sources") / FOLDER
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def read_mapping(mapping: str | Path) -> Mapping:
    """Read and check a table.

    Args:
        mapping: name of one in this package (:func:`shipped_mappings`), or a JSON file.

    Raises:
        UserError: when there is none of that name, or it is not valid; the message names the field.
    """
    path = Path(mapping)
    if str(mapping) in shipped_mappings():
        path = Path(str(resources.files("nnssl_plugin.checkpoints.sources") / FOLDER / f"{mapping}.json"))
    if not path.is_file():
        raise UserError(
            f"There is no table '{mapping}'.", f"Give a JSON file, or one of: {', '.join(shipped_mappings())}."
        )
    return _checked(read_json(path), path)


def _checked(table: Any, path: Path) -> Mapping:
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a table of format {FORMAT}.", f'Begin with {{"format": {FORMAT}, …}}. {REFERENCE}'
        )
    known = {entry.name for entry in fields(Mapping)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise UserError(f"{path} has unknown fields: {', '.join(unknown)}.", f"Known: {', '.join(sorted(known))}.")
    for name in TEXTS:
        if not isinstance(table.get(name, ""), str):
            raise _wrong(path, name, "a text")
    for name in LISTS:
        if not isinstance(table.get(name, []), list):
            raise _wrong(path, name, "a list")
    if not table.get("name"):
        raise _wrong(path, "name", "a text that is not empty")
    numbers = table.get("spacing_mm", [])
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        raise _wrong(path, "spacing_mm", "a list of millimetres")
    for name in ("normalisation", "channels"):
        if not all(isinstance(entry, str) for entry in table.get(name, [])):
            raise _wrong(path, name, "a list of texts")
    rules = {"rename": _renames(table.get("rename", []), path), "drop": _drops(table.get("drop", []), path)}
    facts = {name: tuple(table.get(name, [])) for name in LISTS if name not in rules}
    texts = {name: table.get(name, "") for name in TEXTS}
    return Mapping(**texts, **facts, **rules, network=_network(table.get("network"), path))


def _renames(rules: list, path: Path) -> tuple[tuple[re.Pattern, str], ...]:
    compiled = []
    for rule in rules:
        if not isinstance(rule, list) or len(rule) != 2 or not all(isinstance(entry, str) for entry in rule):
            raise _wrong(path, "rename", "a list of pairs [regular expression, replacement]")
        pattern = _pattern(rule[0], path, "rename")
        try:
            re.compile(f"(?:{rule[0]})|").sub(rule[1], "")  # the empty match: tells unknown groups before any key does
        except (re.error, IndexError) as error:
            raise _wrong(path, "rename", f"valid, but the replacement '{rule[1]}' is not: {error}") from error
        compiled.append((pattern, rule[1]))
    return tuple(compiled)


def _drops(rules: list, path: Path) -> tuple[re.Pattern, ...]:
    if not all(isinstance(rule, str) for rule in rules):
        raise _wrong(path, "drop", "a list of regular expressions")
    return tuple(_pattern(rule, path, "drop") for rule in rules)


def _pattern(text: str, path: Path, name: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise _wrong(path, name, f"a list of regular expressions; '{text}' is none: {error}") from error


def _network(network: Any, path: Path) -> dict[str, Any] | None:
    if network is None:
        return None
    kinds = {"class": str, "kwargs": dict}
    if not isinstance(network, dict) or {name: type(value) for name, value in network.items()} != kinds:
        raise _wrong(path, "network", 'null or {"class": dotted name, "kwargs": {…}}')
    return network


def _wrong(path: Path, name: str, wanted: str) -> UserError:
    return UserError(f"{path}: '{name}' must be {wanted}.", REFERENCE)
