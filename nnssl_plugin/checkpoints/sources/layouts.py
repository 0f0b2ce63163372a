"""What the files of nnU-Net say about their network and their training, in this package's terms.

Layout read in: ``nnunetv2/training/nnUNetTrainer/nnUNetTrainer.py`` (``save_checkpoint``). That of MIC-DKFZ/nnssl is in
``nnssl_layout.py``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_plugin.checkpoints.format.provenance import describe_input, describe_network
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.networks.family import family_of_class
from nnssl_plugin.nnunet.plans import resolve_configuration

UNUSABLE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError)
"""What reading a plan raises that lacks entries or holds something else in their place."""
PRIMUS = "dynamic_network_architectures.architectures.primus"
PRIMUS_SCALES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
"""Width, depth and heads of the Primus networks (arXiv 2503.01835, Table 2)."""
PRIMUS_PATCH = (8, 8, 8)
PRIMUS_TRAINER = re.compile(r"_Primus(V\d)?_?([SBML])_")
"""Version and size in the names of nnU-Net's trainers that build Primus whatever network the plan names."""
PRIMUS_DROP_PATH = 0.2
"""Rate of stochastic depth in all of nnU-Net's trainers of Primus."""


@dataclass(frozen=True)
class Keys:
    """Where the encoder, its first layers and the learned positions of a network lie in its state dict."""

    encoder: str | None = None
    stem: str | None = None
    positions: str | None = None


def keys_of_network(network: Mapping[str, Any] | None) -> Keys:
    """The keys of a described network, by the name of its class; empty for classes of no known family."""
    family = family_of_class(str(network["class"])) if network else None
    return Keys(family.encoder, family.stem, family.positions) if family else Keys()


def first_layer_channels(weights: Mapping[str, Tensor], stem: str | None) -> int | None:
    """Input channels of the first convolution below ``stem``; None where that cannot be told."""
    if stem is None:
        return None
    return next(
        (
            value.shape[1]
            for key, value in weights.items()
            if key.startswith(f"{stem}.") and key.endswith("weight") and value.ndim in (4, 5)
        ),
        None,
    )


def nnunet_plan_of(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], str, dict[str, Any]] | None:
    """Plan, configuration and dataset.json of a checkpoint that nnU-Net wrote; None where it is not to be had.

    They lie in the checkpoint's ``init_args``, or else in the folder ``TRAINER__PLANS__CONFIGURATION`` above its fold.
    """
    arguments = content.get("init_args")
    if isinstance(arguments, Mapping) and isinstance(arguments.get("plans"), Mapping):
        return dict(arguments["plans"]), arguments.get("configuration"), dict(arguments.get("dataset_json") or {})
    folder = path.resolve().parent.parent
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        return None
    plan, description = (read_json(folder / name, dict) for name in ("plans.json", "dataset.json"))
    return plan, folder.name.rpartition("__")[2], description


def plan_of_adapted(path: Path) -> dict[str, Any] | None:
    """The plan that ``adapt`` wrote beside its weights, found by its name and by the weights that it names."""
    for file in sorted(path.parent.glob("*.json")):
        if not path.stem.startswith(f"{file.stem}_"):
            continue
        plan = read_json(file)
        if isinstance(plan, dict) and _mapping(plan.get("finetuning")).get("weights") == path.name:
            return plan
    return None


def network_of_plan(plans: Mapping[str, Any], configuration: str, path: Path) -> dict[str, Any]:
    """Class and arguments of the network that a plan of a checkpoint names.

    Raises:
        UserError: for a plan that nnU-Net could not use.
    """
    try:
        return describe_network(plans, configuration)
    except UNUSABLE as error:
        raise _unusable(path, error) from error


def nnunet_network(
    plans: Mapping[str, Any], configuration: str, path: Path, trainer: str | None
) -> dict[str, Any] | None:
    """Class and arguments of the network that a trainer of nnU-Net built: that of the plan, or its own Primus.

    Raises:
        UserError: for a plan that nnU-Net could not use.
    """
    planned, found = network_of_plan(plans, configuration, path), PRIMUS_TRAINER.search(trainer or "")
    if found is None:
        return planned
    shape = resolve_configuration(plans, configuration)["patch_size"]
    primus = named_primus(f"Primus{found[1] or ''}{found[2]}", shape)
    return primus and {**primus, "kwargs": primus["kwargs"] | {"drop_path_rate": PRIMUS_DROP_PATH}}


def named_primus(name: str, shape: Sequence[int]) -> dict[str, Any] | None:
    """``PrimusM``, ``PrimusV2M``, ``PrimusV3M`` and their other sizes; None for other names.

    Args:
        name: of the class in dynamic_network_architectures.
        shape: its input in voxels.
    """
    family, scale = family_of_class(name), PRIMUS_SCALES.get(name[-1:])
    if scale is None or family is None or family.encoder != "eva":
        return None
    width, depth, heads = scale
    arguments = {
        "embed_dim": width,
        "patch_embed_size": list(PRIMUS_PATCH),
        "eva_depth": depth,
        "eva_numheads": heads,
        "input_shape": list(shape),
        "init_values": 0.1,
        "scale_attn_inner": True,
    }
    return {"class": f"{PRIMUS}.{name[:-1]}", "kwargs": arguments}


def nnunet_provenance(
    plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], *, trainer: str | None, path: Path
) -> dict[str, Any]:
    """What a supervised nnU-Net was trained on, in the fields of ``provenance.describe_pretraining``.

    Raises:
        UserError: for a plan that nnU-Net could not use.
    """
    try:
        seen = describe_input(plans, configuration, dataset_json)
        resolved = resolve_configuration(plans, configuration)
        data = {"dataset": plans["dataset_name"], "cases": _whole(dataset_json.get("numTraining"))}
    except UNUSABLE as error:
        raise _unusable(path, error) from error
    return {
        "method": f"supervised, {trainer or 'nnU-Net'}",
        "data": data,
        "plans_name": plans.get("plans_name"),
        "configuration": configuration,
        **seen,
        "patch_size": list(resolved["patch_size"]),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _unusable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"The plan of {path} cannot be used: {type(error).__name__}: {error}.",
        "Put the plans.json and dataset.json of its training two folders above it, or give the weights "
        "alone with a mapping.",
    )
