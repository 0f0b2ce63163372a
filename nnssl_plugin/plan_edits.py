"""Edits of a plan: ``key=value`` assignments and presets on a plan's dictionary, and checks of the result.

Only :func:`write_edited_plan` reads and writes the files of a dataset; everything else works on dictionaries.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.files import write_json
from nnssl_plugin.plan_files import (
    build_network,
    check_name,
    dataset_folder,
    read_dataset_json,
    read_plan,
    resolve_configuration,
)

ABSOLUTE = ("configurations", "pretraining", "finetuning")
"""First parts of keys that start at the top of the plan; every other key goes under ``pretraining``."""
PREPROCESSING = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data",
                 "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs")
"""Fields of a configuration that its preprocessed cases were made with."""
ABSENT = "not set"


@dataclass(frozen=True)
class Change:
    """One value that an edit changed."""

    path: tuple[str, ...]
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {_shown(self.old)} → {_shown(self.new)}"


@dataclass(frozen=True)
class EditedPlan:
    """A plan that was written."""

    path: Path
    changes: list[Change]
    to_preprocess: list[str]
    """Configurations whose data must be preprocessed before training."""


def write_edited_plan(
    dataset: str,
    name: str,
    *,
    source: str = "nnUNetPlans",
    preset: str | None = None,
    assignments: Sequence[str] = (),
    overwrite: bool = False,
) -> EditedPlan:
    """Write the plan ``name`` of a preprocessed dataset: ``source`` with a preset and assignments.

    Args:
        dataset: ID or full name.
        name: ``plans_name`` and file name of the new plan.
        source: the plan to start from.
        preset: fragment of a plan in ``nnssl_plugin.plans`` that is merged in before the assignments.
        assignments: ``key=value`` texts, see :func:`parse_assignment`.
        overwrite: replace an existing plan of this name that says something else.

    Raises:
        UserError: for a bad name, an unknown key, a plan that does not hold together, or an existing plan.
    """
    check_name(name)
    if name == source:
        raise UserError(f"The new plan has the name of its source, {name}; plans are never edited in place.",
                        f"For example: -n {name}-edited")
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, source), read_dataset_json(folder)
    block = list(leaves(read_preset(preset), ())) if preset else []
    edited, changes = edit_plan(plans, name, [*block, *map(parse_assignment, assignments)])
    to_preprocess = check_plan(edited, plans, dataset_json)
    path = folder / f"{name}.json"
    if path.exists() and not overwrite and read_plan(folder, name) != edited:
        raise UserError(f"{path} exists and says something else.", "Choose another name, or add --overwrite.")
    write_json(path, edited)
    return EditedPlan(path, changes, to_preprocess)


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """``key=value`` as a path from the top of the plan, and a value (JSON where it parses, else the string).

    Raises:
        UserError: when there is no ``=`` or the key has an empty part.
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise UserError(f"'{text}' is not of the form key=value.", "For example: --set epochs=50 method.epsilon=0.1")
    if path[0] not in ABSOLUTE:
        path = ("pretraining", *path)
    try:
        return path, json.loads(value)
    except json.JSONDecodeError:
        return path, value


def read_preset(name: str) -> dict[str, Any]:
    """The preset ``name`` of the package: a fragment of a plan, ``{"pretraining": {...}}``.

    Raises:
        UserError: for a name that is none, naming those that there are.
    """
    folder = resources.files("nnssl_plugin.plans")
    known = sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json"))
    if name not in known:
        raise UserError(f"There is no preset '{name}'.", f"Known presets: {', '.join(known) or 'none'}.")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def edit_plan(
    plans: Mapping[str, Any], name: str, assignments: Sequence[tuple[tuple[str, ...], Any]]
) -> tuple[dict[str, Any], list[Change]]:
    """A copy of ``plans`` under a new name with values assigned in order.

    A value that a configuration inherits is first copied into it, so that its parent keeps its own.

    Args:
        plans: the plan to start from; it stays as it is.
        name: ``plans_name`` of the copy.
        assignments: paths from the top of the plan, and values.

    Returns:
        the new plan, and every value that differs from ``plans``, except the name.

    Raises:
        UserError: for a path inside ``configurations`` that the plan does not have.
    """
    edited = {**deepcopy(dict(plans)), "plans_name": name}
    for path, value in assignments:
        if path[0] == "configurations":
            _check_path(edited, path)
            _own(edited, path)
        _assign(edited, path, deepcopy(value))
    return edited, [change for change in _compare(plans, edited) if change.path != ("plans_name",)]


def leaves(block: Mapping[str, Any], under: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of nested dictionaries with their paths, so that a block merges instead of replacing another."""
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*under, key))
        else:
            yield (*under, key), value


def check_plan(edited: Mapping[str, Any], source: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> list[str]:
    """Check every configuration that differs from ``source``: it must build, divide, and have its data.

    Returns:
        configurations that must be preprocessed before training, as the edit gave them data of their own.

    Raises:
        UserError: for a network that cannot be built, a patch that the strides do not divide, or a change of
            preprocessing under the name of the existing data.
    """
    to_preprocess = []
    for configuration in edited["configurations"]:
        before, after = (resolve_configuration(plans, configuration) for plans in (source, edited))
        if before == after:
            continue
        if (before["architecture"], before["patch_size"]) != (after["architecture"], after["patch_size"]):
            build_network(edited, configuration, dataset_json, device="meta")
            _check_strides(after, configuration)
        if _check_preprocessing(before, after, configuration, edited["plans_name"]):
            to_preprocess.append(configuration)
    return to_preprocess


def _check_path(plans: Mapping[str, Any], path: tuple[str, ...]) -> None:
    if len(path) < 3:
        raise UserError(f"'{'.'.join(path)}' is not a value of a configuration.",
                        "For example: --set configurations.3d_fullres.batch_size=2")
    known: Any = resolve_configuration(plans, path[1])
    for depth, part in enumerate(path[2:], 2):
        if not isinstance(known, Mapping) or part not in known:
            options = list(known) if isinstance(known, Mapping) else []
            close = difflib.get_close_matches(part, options, 1)
            raise UserError(f"The plan has no '{'.'.join(path[:depth + 1])}'.",
                            f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(options) or 'none'}.")
        known = known[part]


def _own(plans: dict[str, Any], path: tuple[str, ...]) -> None:
    configuration, field = plans["configurations"][path[1]], path[2]
    if field not in configuration:
        configuration[field] = resolve_configuration(plans, path[1])[field]


def _assign(plans: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    place = plans
    for depth, part in enumerate(path[:-1], 1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"'{'.'.join(path[:depth])}' is a value ({_shown(place)}), not a block of values.",
                            f"Set it as a whole: --set {'.'.join(path[:depth])}=…")
    place[path[-1]] = value


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    old, new = dict(leaves(before)), dict(leaves(after))
    return [Change(path, old.get(path, ABSENT), new.get(path, ABSENT))
            for path in [*new, *(path for path in old if path not in new)]
            if old.get(path, ABSENT) != new.get(path, ABSENT)]


def _check_strides(configuration: Mapping[str, Any], name: str) -> None:
    strides = configuration["architecture"]["arch_kwargs"].get("strides")
    if strides is None:
        return
    patch = configuration["patch_size"]
    stages = [[stride] * len(patch) if isinstance(stride, int) else stride for stride in strides]
    divisors = [math.prod(axis) for axis in zip(*stages, strict=True)]
    if len(divisors) != len(patch) or any(size % divisor for size, divisor in zip(patch, divisors, strict=True)):
        fitting = [max(divisor, size // divisor * divisor) for size, divisor in zip(patch, divisors, strict=False)]
        raise UserError(
            f"The patch size {patch} of {name} is not divisible by the network's strides {divisors}.",
            f"For example: --set configurations.{name}.patch_size={json.dumps(fitting, separators=(',', ':'))}",
        )


def _check_preprocessing(before: Mapping[str, Any], after: Mapping[str, Any], name: str, plans_name: str) -> bool:
    changed = [field for field in PREPROCESSING if before.get(field) != after.get(field)]
    if not changed:
        return False
    if before["data_identifier"] == after["data_identifier"]:
        raise UserError(
            f"{', '.join(changed)} of {name} changed, but '{after['data_identifier']}' was preprocessed otherwise.",
            f"Give it data of its own: --set configurations.{name}.data_identifier={plans_name}_{name}, "
            "and preprocess it with the command that is then printed.",
        )
    return True


def _shown(value: Any) -> str:
    return value if value is ABSENT else json.dumps(value)
