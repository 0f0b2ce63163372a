"""Plan files of a preprocessed dataset: finding, reading and naming them, and the network that a plan describes."""

import inspect
import os
import pydoc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.networks.family import family_of_class
from nnssl_plugin.nnunet.dataset_json import DATASET_FILE, read_dataset_file
from nnssl_plugin.nnunet.network_classes import check_architecture

RESERVED = ("dataset", "dataset_fingerprint", "splits_final")
"""Names of nnU-Net's own JSON files beside the plans."""
UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What network classes raise for arguments that do not fit together; nnU-Net's check most of them by assertion."""


def dataset_folder(dataset: str) -> Path:
    """The folder of a dataset in nnUNet_preprocessed.

    Args:
        dataset: ID (``501``) or full name (``Dataset501_Brain``).

    Raises:
        UserError: when nnUNet_preprocessed is not set, or nothing was preprocessed there for the dataset.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise UserError("nnUNet_preprocessed is not set.", "export nnUNet_preprocessed=/path/to/nnUNet_preprocessed")
    try:
        folder = Path(root) / maybe_convert_to_dataset_name(str(dataset))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"There is no dataset {dataset} in {root}.", _preprocess(dataset)) from error
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", _preprocess(dataset))
    return folder


def read_plan(folder: Path, name: str) -> dict[str, Any]:
    """The plan ``name`` of a preprocessed dataset.

    Raises:
        UserError: when there is none, naming those that there are.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        present = sorted(p.stem for p in folder.glob("*.json") if p.stem not in RESERVED and _is_plan(p))
        raise UserError(
            f"There is no plan {path}; here are: {', '.join(present) or 'none'}.",
            f"Name one with -p, or: {_preprocess(folder.name)}",
        )
    plan = read_json(path, dict)
    for key, example in (("plans_name", "the plan's name"), ("configurations", "an object of configurations")):
        if not isinstance(plan.get(key), str if key == "plans_name" else dict):
            raise UserError(f'{path} is no plan of nnU-Net v2: "{key}" is not {example}.', _preprocess(folder.name))
    return plan


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """nnU-Net's ``dataset.json`` of a preprocessed dataset.

    Raises:
        UserError: when it is missing or damaged.
    """
    path = folder / DATASET_FILE
    if not path.is_file():
        raise UserError(f"There is no {path}.", _preprocess(folder.name))
    return read_dataset_file(path)


def resolve_configuration(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration with everything that it inherits, as a copy.

    Raises:
        UserError: when the plan has no such configuration.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    if configuration not in plans["configurations"]:
        raise UserError(
            f"Plan {plans['plans_name']} has no configuration {configuration}; it has: "
            f"{', '.join(plans['configurations'])}.",
            f"Name one with -c, or: {_preprocess(plans['dataset_name'], configuration)}",
        )
    return PlansManager(dict(plans)).get_configuration(configuration).configuration


def results_of(dataset_name: str, plans_name: str) -> list[Path]:
    """Folders of results (``TRAINER__PLANS__CONFIG``) of a plan; none where nnUNet_results is not set."""
    root = os.environ.get("nnUNet_results")
    return sorted(Path(root, dataset_name).glob(f"*__{plans_name}__*")) if root else []


def check_name(name: str) -> None:
    """Refuse names that would break paths or nnU-Net's own parsing of ``TRAINER__PLANS__CONFIG``.

    Raises:
        UserError: for ``__``, path separators, anything but letters, digits, ``. _ + -``, and reserved names.
    """
    if "__" in name:
        raise UserError(
            f"The name '{name}' holds '__', at which nnU-Net splits TRAINER__PLANS__CONFIG.",
            f"For example: -n {re.sub('_+', '_', name)}",
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) or name.endswith("_") or name in RESERVED:
        raise UserError(f"'{name}' cannot name a plan.", "Use letters, digits and . _ + - (for example: -n s2dc).")


def build_network(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    *,
    channels: int | None = None,
    device: str = "cpu",
    trust: bool = False,
) -> nn.Module:
    """The freshly initialised network that nnU-Net would train, with the dataset's channels and classes.

    Args:
        plans: the plan.
        configuration: one of its configurations.
        dataset_json: for the number of channels and classes.
        channels: of the input, where they are not the dataset's.
        device: ``meta`` builds it without memory, for checks.
        trust: build whatever class the plan names (:func:`~nnssl_plugin.nnunet.network_classes.check_architecture`).

    Raises:
        UserError: when it names a class that is not known, or its arguments do not fit together.
    """
    whose = f"{plans.get('plans_name')}, {configuration}"
    try:
        architecture = resolve_configuration(plans, configuration)["architecture"]
        channels = channels or input_channels(plans, configuration, dataset_json)
        classes = _classes(plans, dataset_json)
    except UNBUILDABLE as error:
        raise _unbuildable(whose, error) from error
    return build_described(architecture, channels, whose, classes=classes, device=device, trust=trust)


def build_described(
    architecture: Mapping[str, Any],
    channels: int,
    whose: str,
    *,
    classes: int = 2,
    device: str = "meta",
    trust: bool = False,
) -> nn.Module:
    """The freshly initialised network of a plan's ``architecture``.

    Args:
        architecture: class, arguments, and which of them are names of classes.
        channels: of the input.
        whose: whose architecture it is, for messages.
        classes: channels of the output.
        device: ``meta`` builds it without memory, for checks.
        trust: build whatever class it names (:func:`~nnssl_plugin.nnunet.network_classes.check_architecture`).

    Raises:
        UserError: when it names a class that is not known, or its arguments do not fit together.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    check_architecture(architecture, whose, trust=trust)
    try:
        with torch.device(device):
            return get_network_from_plans(
                architecture["network_class_name"],
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
                channels,
                classes,
                deep_supervision=takes_deep_supervision(architecture["network_class_name"]) or None,
            )
    except UNBUILDABLE as error:
        raise _unbuildable(whose, error) from error


def _unbuildable(whose: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return UserError(
        f"The network of {whose} cannot be built: {reason}",
        "Mend its architecture in the plan; its lists need one entry per stage.",
    )


def takes_deep_supervision(network_class: str) -> bool:
    """Whether a network class (dotted name) takes ``deep_supervision``, as its family or else its signature says."""
    family = family_of_class(network_class)
    if family is not None:
        return family.deep_supervision
    located: Any = pydoc.locate(network_class)
    return located is None or "deep_supervision" in inspect.signature(located).parameters


def input_channels(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> int:
    """Channels that the network reads (a cascade also reads the previous stage's classes)."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return determine_num_input_channels(PlansManager(dict(plans)), configuration, dict(dataset_json))


def _classes(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> int:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(dict(plans)).get_label_manager(dict(dataset_json)).num_segmentation_heads


def _is_plan(path: Path) -> bool:
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and "plans_name" in content


def _preprocess(dataset: str, configuration: str = "3d_fullres") -> str:
    number = re.match(r"Dataset(\d{3})", str(dataset))
    return f"nnUNetv2_plan_and_preprocess -d {int(number[1]) if number else dataset} -c {configuration}"
