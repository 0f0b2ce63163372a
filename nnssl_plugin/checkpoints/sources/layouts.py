"""What the files of nnU-Net and of MIC-DKFZ/nnssl say about their network and their training, in this package's terms.

Layouts read in: ``nnunetv2/training/nnUNetTrainer/nnUNetTrainer.py`` (``save_checkpoint``); MIC-DKFZ/nnssl,
``adaptation_planning/adaptation_plan.py``, ``architectures/architecture_registry.py``, ``get_network_by_name.py`` and
``training/nnsslTrainer/AbstractTrainer.py``.
"""

import math
from collections.abc import Mapping
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
UNET = "dynamic_network_architectures.architectures.unet"
PRIMUS = "dynamic_network_architectures.architectures.primus.Primus"
RES_ENC_L = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1, 1, 1, 1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""nnssl's ``get_res_enc_l``, spelled as nnU-Net's planner spells it."""
PRIMUS_SCALES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
"""Width, depth and heads of the Primus networks (arXiv 2503.01835, Table 2)."""
PRIMUS_PATCH = (8, 8, 8)
ADAPTATION_PLAN = "adaptation_plan.json"


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


def with_nnssl_block(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint of nnssl with its adaptation plan, where that lies beside it as a file.

    Its Spark trainer leaves the plan out of its checkpoints; nnssl writes ``adaptation_plan.json`` into the folder of
    the training, two above the file, and its repositories hold it beside the file.
    """
    if "network_weights" not in content or not {"nnssl_adaptation_plan", "provenance", "adaptation"}.isdisjoint(
        content
    ):
        return content
    place = path.resolve().parent
    for file in (place / ADAPTATION_PLAN, place.parent / ADAPTATION_PLAN):
        block = read_json(file) if file.is_file() else None
        if isinstance(block, dict) and "architecture_plans" in block:
            return content | {"nnssl_adaptation_plan": block}
    return content


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


def nnssl_network(block: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Class and arguments of the network that nnssl's fine-tuning would build; None for one that is not known here."""
    architecture = block.get("architecture_plans") or {}
    name, arguments = architecture.get("arch_class_name", ""), architecture.get("arch_kwargs")
    if arguments:
        return {"class": name if "." in name else f"{UNET}.{name}", "kwargs": dict(arguments)}
    if name in ("ResEncL", "NoSkipResEncL"):  # the latter differs in its decoder alone
        return {"class": f"{UNET}.ResidualEncoderUNet", "kwargs": dict(RES_ENC_L)}
    scale = PRIMUS_SCALES.get(name.removeprefix("Primus")) if name.startswith("Primus") else None
    if scale is None:
        return None
    width, depth, heads = scale
    return {
        "class": PRIMUS,
        "kwargs": {
            "embed_dim": width,
            "patch_embed_size": list(PRIMUS_PATCH),
            "eva_depth": depth,
            "eva_numheads": heads,
            "input_shape": _primus_shape(block, weights),
            "init_values": 0.1,
            "scale_attn_inner": True,
        },
    }


def nnssl_provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the nnssl plan of a checkpoint says of its pretraining; fields that it does not state are absent."""
    plan = _mapping(content["nnssl_adaptation_plan"].get("pretrain_plan"))
    name, settings = next(iter(_mapping(plan.get("configurations")).items()), (None, {}))
    arguments = _mapping(content.get("init_args"))
    stated = {
        "method": f"nnssl {content['trainer_name']}" if content.get("trainer_name") else None,
        "data": {"dataset": plan["dataset_name"]} if plan.get("dataset_name") else None,
        "plans_name": plan.get("plans_name"),
        "configuration": arguments.get("configuration_name") or name,
        "normalisation": _list(_mapping(settings).get("normalization_schemes")),
        "spacing_mm": _list(_mapping(settings).get("spacing")),
        "patch_size": _list(_mapping(settings).get("patch_size")),
        "transpose_forward": _list(plan.get("transpose_forward")),
        "reader": plan.get("image_reader_writer"),
        "citations": list(content.get("citations") or []),
    }
    return {key: value for key, value in stated.items() if value not in (None, [])}


def in_names_of(
    network: Mapping[str, Any] | None, block: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """nnssl's weights under the names of the network itself: SimCLR and VoCo keep Primus below ``encoder.``."""
    ours, notes = keys_of_network(network), []
    for theirs, name in ((block.get("key_to_encoder"), ours.encoder), (block.get("key_to_stem"), ours.stem)):
        if name is None or not theirs or theirs == name:
            continue
        weights = {
            name + key[len(theirs) :] if key.startswith(f"{theirs}.") else key: value for key, value in weights.items()
        }
        notes.append(f"'{theirs}.' is called '{name}.' in the network")
    return dict(weights), notes


def _primus_shape(block: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[int]:
    """The patch of the pretraining in voxels: the candidate whose token grid the learned positions fill."""
    positions = weights.get(block.get("key_to_lpe") or "eva.pos_embed")
    configurations = _mapping(_mapping(block.get("pretrain_plan")).get("configurations"))
    candidates = [_list(_mapping(entry).get("patch_size")) for entry in configurations.values()]
    candidates = [shape for shape in [*candidates, _list(block.get("recommended_downstream_patchsize"))] if shape]
    if positions is None:
        return candidates[0] if candidates else [160, 160, 160]
    tokens = positions.shape[1]
    side = round(tokens ** (1 / 3))
    cube = [side * patch for patch in PRIMUS_PATCH]
    fitting = [
        shape
        for shape in candidates
        if math.prod(n // patch for n, patch in zip(shape, PRIMUS_PATCH, strict=True)) == tokens
    ]
    return (fitting or [cube])[0]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _list(value: Any) -> list | None:
    return None if value is None or isinstance(value, str) else list(getattr(value, "tolist", lambda: value)())


def _unusable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"The plan of {path} cannot be used: {type(error).__name__}: {error}.",
        "Put the plans.json and dataset.json of its training two folders above it, or give the weights "
        "alone with a mapping.",
    )
