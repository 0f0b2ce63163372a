"""Edits of a plan: ``key=value`` assignments and presets on a plan's dictionary, and checks of the result.

Only the functions that begin with ``write`` touch the files of a dataset; everything else works on dictionaries.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.networks.family import family_of_class, no_divisor, product_of_strides
from nnssl_plugin.nnunet.plans import (
    UNBUILDABLE,
    build_network,
    check_name,
    dataset_folder,
    read_dataset_json,
    read_plan,
    resolve_configuration,
)
from nnssl_plugin.settings import Count, Positive, assignment, closest, converted, described, with_brackets

ABSOLUTE = ("configurations", "pretraining", "finetuning", "classification")
"""First parts of keys that start at the top of the plan; every other key goes under ``pretraining``."""
PREPROCESSING = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
"""Fields of a configuration that its preprocessed cases were made with."""
PRESET_NETWORKS = {"architecture": 3, "architecture_2d": 2}
"""Keys of a preset that hold a network, and the number of spatial axes that it is for."""
PER_AXIS = {"patch_size": Count, "spacing": Positive, "median_image_size_in_voxels": Positive}
"""Fields of a configuration with one number per axis."""
FIELDS = {
    "data_identifier": str,
    "preprocessor_name": str,
    "batch_size": Count,
    "batch_dice": bool,
    "normalization_schemes": tuple[str, ...],
    "use_mask_for_norm": tuple[bool, ...],
    "resampling_fn_data": str,
    "resampling_fn_seg": str,
    "resampling_fn_probabilities": str,
    "resampling_fn_data_kwargs": dict,
    "resampling_fn_seg_kwargs": dict,
    "resampling_fn_probabilities_kwargs": dict,
    "architecture": dict,
}
"""Further fields of a configuration, and what they take."""
ABSENT = "not set"
Assignment = tuple[tuple[str, ...], Any]
"""Path from the top of the plan, and value."""
BlockCheck = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Refuses a plan (first) whose blocks, where they differ from those of its source (second), no trainer would read."""


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
    notes: list[str] = field(default_factory=list)
    """What else there is to know about the choices that were made."""


def write_edited_plan(
    dataset: str,
    name: str,
    *,
    source: str = "nnUNetPlans",
    presets: Sequence[str] = (),
    assignments: Sequence[str] = (),
    overwrite: bool = False,
    trust: bool = False,
    check_blocks: BlockCheck | None = None,
) -> EditedPlan:
    """Write the plan ``name`` of a preprocessed dataset: ``source`` with presets and assignments.

    Args:
        dataset: ID or full name.
        name: ``plans_name`` and file name of the new plan.
        source: the plan to start from.
        presets: fragments of a plan in ``nnssl_plugin.plans`` that are merged in before the assignments.
        assignments: ``key=value`` texts, see :func:`parse_assignment`.
        overwrite: replace an existing plan of this name that says something else.
        trust: build networks of classes that are not known, too, to check them.
        check_blocks: checks the blocks that trainers read, which this package does not know.

    Raises:
        UserError: for a bad name, an unknown key, a plan that does not hold together, or an existing plan.
    """
    check_new_name(name, source)
    folder = dataset_folder(dataset)
    plans = read_plan(folder, source)
    asked = asked_for(plans, presets, assignments)
    return write_changed_plan(folder, plans, name, asked, overwrite=overwrite, trust=trust, check_blocks=check_blocks)


def asked_for(plans: Mapping[str, Any], presets: Sequence[str], assignments: Sequence[str]) -> list[Assignment]:
    """Presets in their order, then ``key=value`` texts, as assignments to a plan.

    Raises:
        UserError: for an unknown preset, presets of different methods, or a text that is no assignment.
    """
    fragments = {preset: read_preset(preset) for preset in presets}
    _check_one_method(plans, fragments)
    values = [value for fragment in fragments.values() for value in preset_assignments(fragment, plans)]
    return [*values, *map(parse_assignment, assignments)]


def check_new_name(name: str, source: str) -> None:
    """Refuse a name that cannot be a plan's, or is that of the plan it starts from.

    Raises:
        UserError: for such a name.
    """
    check_name(name)
    if name == source:
        raise UserError(
            f"The new plan has the name of its source, {name}; plans are never edited in place.",
            f"For example: -n {name}-edited",
        )


def write_changed_plan(
    folder: Path,
    plans: Mapping[str, Any],
    name: str,
    assignments: Sequence[Assignment],
    *,
    overwrite: bool = False,
    trust: bool = False,
    check_blocks: BlockCheck | None = None,
) -> EditedPlan:
    """Write ``plans`` with assignments as the plan ``name`` into the folder of its preprocessed dataset.

    Raises:
        UserError: for an unknown key, a plan that does not hold together, or an existing plan that says something else.
    """
    edited, changes = edit_plan(plans, name, assignments)
    if check_blocks is not None:
        check_blocks(edited, plans)
    to_preprocess = check_plan(edited, plans, read_dataset_json(folder), trust=trust)
    path = folder / f"{name}.json"
    if path.exists() and not overwrite and read_plan(folder, name) != edited:
        raise UserError(f"{path} exists and says something else.", "Choose another name, or add --overwrite.")
    write_json(path, edited)
    return EditedPlan(path, changes, to_preprocess)


def parse_assignment(text: str) -> Assignment:
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
    """The preset ``name`` of the package: a fragment of a plan, with ``pretraining``, networks or both.

    Raises:
        UserError: for a name that is none, naming those that there are.
    """
    folder = resources.files("nnssl_plugin.plans")
    known = sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json"))
    if name not in known:
        raise UserError(f"There is no preset '{name}'.", f"Known presets: {', '.join(known) or 'none'}.")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def preset_assignments(fragment: Mapping[str, Any], plans: Mapping[str, Any]) -> list[Assignment]:
    """What a preset sets in a plan: its values one by one, and its networks in every configuration that they are for.

    Raises:
        UserError: for a preset with networks and a plan without a configuration for any of them.
    """
    networks = {PRESET_NETWORKS[key]: value for key, value in fragment.items() if key in PRESET_NETWORKS}
    values = list(leaves({key: value for key, value in fragment.items() if key not in PRESET_NETWORKS}))
    patches = {name: resolve_configuration(plans, name)["patch_size"] for name in plans["configurations"]}
    fitted = {name: patch for name, patch in patches.items() if len(patch) in networks}
    if networks and not fitted:
        raise UserError(
            f"Plan {plans['plans_name']} has no {' or '.join(f'{n}D' for n in networks)} configuration for the network "
            "of the preset.",
            f"Plan one: nnUNetv2_plan_and_preprocess -d ID -c {'3d_fullres' if 3 in networks else '2d'}",
        )
    for name, patch in fitted.items():
        architecture = networks[len(patch)]
        divisors = patch_divisors(architecture, len(patch))
        fitting = more_than_one_voxel(fitting_patch(patch, divisors), divisors, patch)
        values += network_assignments(name, architecture, fitting)
    return values


def network_assignments(configuration: str, architecture: Mapping[str, Any], patch: Sequence[int]) -> list[Assignment]:
    """A network and its patch size (voxels) for one configuration; a network that is told its input size gets it."""
    architecture = deepcopy(dict(architecture))
    if "input_shape" in architecture["arch_kwargs"]:
        architecture["arch_kwargs"]["input_shape"] = list(patch)
    under = ("configurations", configuration)
    return [((*under, "architecture"), architecture), ((*under, "patch_size"), list(patch))]


def patch_divisors(architecture: Mapping[str, Any], dimensions: int) -> list[int]:
    """What the patch must be divisible by, per axis, as the network's family says; by a network of no known family the
    product of its strides, where it has some.

    Raises:
        UserError: for arguments that say no divisor.
    """
    family, arguments = family_of_class(architecture["network_class_name"]), architecture["arch_kwargs"]
    divisors = family.divisors if family else product_of_strides if "strides" in arguments else no_divisor
    try:
        found = divisors(arguments, dimensions)
    except UNBUILDABLE as error:
        raise _no_divisors(architecture) from error
    if len(found) != dimensions or not all(isinstance(divisor, int) and divisor > 0 for divisor in found):
        raise _no_divisors(architecture)
    return found


def _no_divisors(architecture: Mapping[str, Any]) -> UserError:
    return UserError(
        f"The strides or patches of {architecture['network_class_name']} are not whole numbers, one per axis.",
        "Mend the arch_kwargs of its architecture.",
    )


def fitting_patch(wanted: Sequence[int], divisors: Sequence[int]) -> list[int]:
    """The nearest size that is divisible, per axis; the smaller of two that are equally near."""
    return [max(1, math.ceil(size / divisor - 0.5)) * divisor for size, divisor in zip(wanted, divisors, strict=True)]


def more_than_one_voxel(patch: Sequence[int], divisors: Sequence[int], sizes: Sequence[float]) -> list[int]:
    """The patch with its longest axis by ``sizes`` doubled, where the network would come down to a single voxel: one
    cannot be normalised."""
    if list(patch) != list(divisors):
        return list(patch)
    longest = max(range(len(patch)), key=lambda axis: sizes[axis])
    return [size * 2 if axis == longest else size for axis, size in enumerate(patch)]


def edit_plan(
    plans: Mapping[str, Any], name: str, assignments: Sequence[Assignment]
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
        UserError: for a path inside ``configurations`` that the plan does not have, or a value that cannot stand there.
    """
    edited = {**deepcopy(dict(plans)), "plans_name": name}
    for path, value in assignments:
        if path[0] == "configurations":
            _check_value(path, value, _planned_value(edited, path))
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


def check_plan(
    edited: Mapping[str, Any], source: Mapping[str, Any], dataset_json: Mapping[str, Any], *, trust: bool = False
) -> list[str]:
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
            build_network(edited, configuration, dataset_json, device="meta", trust=trust)
            _check_patch(after, configuration)
        if _check_preprocessing(before, after, configuration, edited["plans_name"]):
            to_preprocess.append(configuration)
    return to_preprocess


def _check_one_method(plans: Mapping[str, Any], fragments: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse presets of different methods, or of another than that of the plan they are merged into."""
    named = {f"preset {preset}": _method_of(fragment) for preset, fragment in fragments.items()}
    named = {f"plan {plans.get('plans_name')}": _method_of(plans)} | named
    named = {name: method for name, method in named.items() if method is not None}
    if len(set(named.values())) > 1:
        raise UserError(
            "A pretraining block is for one method, and these are for several: "
            f"{', '.join(f'{name} ({method})' for name, method in named.items())}.",
            "Keep the presets of one method, and start from a plan without another one's: -p nnUNetPlans",
        )


def _method_of(fragment: Mapping[str, Any]) -> str | None:
    block = fragment.get("pretraining")
    return block.get("method_name") if isinstance(block, Mapping) else None


def _planned_value(plans: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What the plan holds at a path inside ``configurations``."""
    if len(path) < 3:
        raise UserError(
            f"'{'.'.join(path)}' is not a value of a configuration.",
            "For example: --set configurations.3d_fullres.batch_size=2",
        )
    known: Any = resolve_configuration(plans, path[1])
    for depth, part in enumerate(path[2:], 2):
        if not isinstance(known, Mapping) or part not in known:
            options = list(known) if isinstance(known, Mapping) else []
            close = closest(part, options)
            raise UserError(
                f"The plan has no '{'.'.join(path[: depth + 1])}'.",
                f"Did you mean '{close}'?" if close else f"There are: {', '.join(options) or 'none'}.",
            )
        known = known[part]
    return known


def _check_value(path: tuple[str, ...], value: Any, planned: Any) -> None:
    """Refuse a value that cannot stand where ``planned`` does; building the network checks the rest of its own."""
    axis, field = PER_AXIS.get(path[2]), FIELDS.get(path[2])
    if len(path) == 3 and (axis is not None or field is not None):
        annotation: Any = field if axis is None else tuple[(axis,) * len(planned)]  # type: ignore[misc]
        with suppress(ValueError):
            converted(value, annotation)
            return
        expected = described(annotation)
    elif planned is None or value is None or isinstance(value, str) == isinstance(planned, str):
        return
    else:
        annotation, expected = tuple[Any, ...], f"a value like {_compact(planned)}"
    example = planned
    if isinstance(planned, list):
        with suppress(ValueError):
            example = with_brackets(value, annotation)
    raise UserError(
        f"'{'.'.join(path)}' cannot be {_compact(value)}; expected {expected}.",
        f"For example: --set {assignment('.'.join(path), example)}",
    )


def _own(plans: dict[str, Any], path: tuple[str, ...]) -> None:
    configuration, field = plans["configurations"][path[1]], path[2]
    if field not in configuration:
        configuration[field] = resolve_configuration(plans, path[1])[field]


def _assign(plans: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    place = plans
    for depth, part in enumerate(path[:-1], 1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(
                f"'{'.'.join(path[:depth])}' is a value ({_shown(place)}), not a block of values.",
                f"Set it as a whole: --set {'.'.join(path[:depth])}=…",
            )
    place[path[-1]] = value


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    old, new = dict(leaves(before)), dict(leaves(after))
    return [
        Change(path, old.get(path, ABSENT), new.get(path, ABSENT))
        for path in [*new, *(path for path in old if path not in new)]
        if old.get(path, ABSENT) != new.get(path, ABSENT)
    ]


def _check_patch(configuration: Mapping[str, Any], name: str) -> None:
    arch_kwargs, patch = configuration["architecture"]["arch_kwargs"], list(configuration["patch_size"])
    divisors = patch_divisors(configuration["architecture"], len(patch))
    place = f"configurations.{name}"
    if len(divisors) != len(patch) or any(size % divisor for size, divisor in zip(patch, divisors, strict=True)):
        fitting = [max(divisor, size // divisor * divisor) for size, divisor in zip(patch, divisors, strict=False)]
        raise UserError(
            f"The patch size {patch} of {name} is not divisible by the network's strides {divisors}.",
            f"For example: --set {place}.patch_size={_compact(fitting)}",
        )
    if patch == divisors and max(divisors) > 1:
        larger = _compact(more_than_one_voxel(patch, divisors, patch))
        raise UserError(
            f"The patch size {patch} of {name} leaves the coarsest stage of its network a single voxel, "
            "which cannot be normalised.",
            f"For example: --set {place}.patch_size={larger}",
        )
    if list(arch_kwargs.get("input_shape", patch)) != patch:
        raise UserError(
            f"The network of {name} is built for patches of {arch_kwargs['input_shape']}, the patch size is {patch}.",
            f"--set {place}.patch_size={_compact(patch)} {place}.architecture.arch_kwargs.input_shape="
            f"{_compact(patch)}",
        )


def _check_preprocessing(before: Mapping[str, Any], after: Mapping[str, Any], name: str, plans_name: str) -> bool:
    changed = [field for field in PREPROCESSING if before.get(field) != after.get(field)]
    if changed and before["data_identifier"] == after["data_identifier"]:
        raise UserError(
            f"{', '.join(changed)} of {name} changed, but '{after['data_identifier']}' was preprocessed otherwise.",
            f"Give it data of its own: --set configurations.{name}.data_identifier={plans_name}_{name}, "
            "and preprocess it with the command that is then printed.",
        )
    return before["data_identifier"] != after["data_identifier"]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _shown(value: Any) -> str:
    return value if value is ABSENT else json.dumps(value)
