"""Where pretrained weights come from: what a checkpoint says about itself, in plain types."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.networks.family import known_family_of
from nnssl_plugin.nnunet.plans import resolve_configuration

FORMAT = 1
"""Version of the layout of ``provenance``; raised when a field changes its meaning."""
PACKAGES = ("nnssl_plugin", "nnunetv2", "torch", "dynamic_network_architectures")
REORIENTING_READERS = ("NibabelIOWithReorient",)
"""nnU-Net's readers that bring every image into RAS; the others keep the axes as stored."""
OWN_BLOCKS = ("pretraining", "finetuning")
"""Blocks that this package adds to a plan and nnU-Net ignores."""
NNSSL_CLASSES = ("ResidualEncoderUNet", "PlainConvUNet")
"""Networks that nnssl and nnU-Net's fine-tuning know by their bare name; others keep their dotted name."""
IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Arguments of nnU-Net's networks that are dotted names."""
NNSSL_PLAN = (
    "dataset_name",
    "plans_name",
    "original_median_spacing_after_transp",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "experiment_planner_used",
)
"""Fields of nnssl's ``Plan`` besides its configurations; it refuses any other."""
NNSSL_CONFIGURATION = (
    "data_identifier",
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "spacing",
    "patch_size",
)
"""Fields of nnssl's ``ConfigurationPlan`` that nnU-Net's configurations have under the same name."""


def describe_pretraining(
    *,
    method: str,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    trained: Sequence[str],
    steps: int,
    cases: int,
    citations: Sequence[Any],
    licence: str,
    network_channels: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The ``provenance`` of a pretraining checkpoint.

    Args:
        method: name of the pretraining method.
        settings: the method's settings, every field.
        training: the training's settings (epochs, learning rate, …), every field.
        plans: nnU-Net's plan that it was trained with.
        configuration: name of the configuration (``3d_fullres``).
        dataset_json: nnU-Net's ``dataset.json`` of the pretraining dataset.
        trained: prefixes of the keys of ``network_weights`` that the losses reached; the rest is still initial.
        steps: optimiser steps done.
        cases: cases that were trained on.
        citations: what to cite with these weights.
        licence: licence of the weights.
        network_channels: channels that the network reads, where the method makes its images out of the dataset's.
        weights: the state dict of the network, for its hash.

    Returns:
        what JSON holds, so that it survives a file of it; ``spacing_mm`` and ``patch_size`` (voxels) follow the
        plan's axes, after ``transpose_forward``.
    """
    resolved = resolve_configuration(plans, configuration)
    seen = describe_input(plans, configuration, dataset_json)
    return _as_json_holds_it(
        {
            "format": FORMAT,
            "method": method,
            "settings": dict(settings),
            "training": dict(training),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "packages": {package: _version(package) for package in PACKAGES},
            "data": {"dataset": plans["dataset_name"], "cases": cases},
            "plans_name": plans["plans_name"],
            "configuration": configuration,
            **seen,
            "network_channels": network_channels or len(seen["channels"]),
            "patch_size": list(resolved["patch_size"]),
            "network": describe_network(plans, configuration),
            "trained": list(trained),
            "steps": steps,
            "citations": list(citations),
            "licence": licence,
            "weights_sha256": weights_hash(weights) if weights is not None else None,
        }
    )


def datasets_of(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The datasets that a provenance names under ``data``: one block, or a list of them for several."""
    data = provenance.get("data") or []
    return [data] if isinstance(data, Mapping) else list(data)


def licence_of(provenance: Mapping[str, Any]) -> str | None:
    """The licence that a provenance states, or the licences of its several datasets in one text."""
    licence = provenance.get("licence")
    return ", ".join(map(str, licence)) if isinstance(licence, (list, tuple)) else licence


def describe_input(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """What a network of this plan sees: channels, normalisation, spacing in mm, and the order of the axes."""
    resolved = resolve_configuration(plans, configuration)
    channels = dataset_json.get("channel_names") or dataset_json.get("modality") or {}
    reader = plans["image_reader_writer"]
    return {
        "channels": [str(channels[key]) for key in sorted(channels, key=int)],
        "normalisation": list(resolved["normalization_schemes"]),
        "spacing_mm": [float(s) for s in resolved["spacing"]],
        "transpose_forward": list(plans["transpose_forward"]),
        "reader": reader,
        "orientation": "RAS" if reader in REORIENTING_READERS else "as stored",
    }


def describe_network(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Class (dotted name) and arguments of the network that the plan names."""
    architecture = resolve_configuration(plans, configuration)["architecture"]
    return {"class": architecture["network_class_name"], "kwargs": deepcopy(architecture["arch_kwargs"])}


def as_architecture(network: Mapping[str, Any]) -> dict[str, Any]:
    """The ``architecture`` of a plan with the network that :func:`describe_network` describes."""
    kwargs = deepcopy(dict(network["kwargs"]))
    return {
        "network_class_name": network["class"],
        "arch_kwargs": kwargs,
        "_kw_requires_import": [key for key in IMPORTED if key in kwargs],
    }


def nnssl_adaptation_plan(
    plans: Mapping[str, Any], configuration: str, network: nn.Module, input_channels: int
) -> dict[str, Any]:
    """The block by which nnssl and nnU-Net's own fine-tuning commands find their way in a checkpoint.

    The layout is that of ``AdaptationPlan.serialize`` (MIC-DKFZ/nnssl, ``nnssl/adaptation_planning/
    adaptation_plan.py``), whose ``from_dict`` refuses fields that it does not know; ``nnUNetv2_preprocess_like_nnssl``
    (MIC-DKFZ/nnUNet, ``experiment_planning/like_nnssl.py``) reads the first configuration of ``pretrain_plan``.

    Args:
        plans: nnU-Net's plan of the pretraining.
        configuration: the configuration that was trained.
        network: the planned network, of a known family.
        input_channels: channels of its input.
    """
    resolved = resolve_configuration(plans, configuration)
    architecture = resolved["architecture"]
    family = known_family_of(network)
    name = architecture["network_class_name"].rpartition(".")[2]
    pretrain_plan = {key: deepcopy(plans[key]) for key in NNSSL_PLAN if key in plans}
    pretrain_plan["configurations"] = {configuration: _nnssl_configuration(resolved)}
    return {
        "architecture_plans": {
            "arch_class_name": name if name in NNSSL_CLASSES else architecture["network_class_name"],
            "arch_kwargs": deepcopy(architecture["arch_kwargs"]),
            "arch_kwargs_requiring_import": list(architecture["_kw_requires_import"]),
        },
        "pretrain_plan": pretrain_plan,
        "pretrain_num_input_channels": input_channels,
        "recommended_downstream_patchsize": list(resolved["patch_size"]),
        "key_to_encoder": family.encoder,
        "key_to_stem": family.stem,
        "keys_to_in_proj": list(family.image_layers),
        "key_to_lpe": family.positions,
    }


def nnssl_citations(method: str, citations: Sequence[str]) -> list[dict[str, Any]]:
    """``citations`` of a checkpoint as nnU-Net's fine-tuning prints them (``PretrainedTrainer.print_citations``)."""
    return [{"type": "Pretraining", "name": method, "apa_citations": list(citations)}]


def _nnssl_configuration(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """nnU-Net's configuration in the fields of nnssl's, which resamples masks where nnU-Net resamples labels."""
    isotropic = all(float(spacing) == 1.0 for spacing in resolved["spacing"])
    return {
        **{key: deepcopy(resolved.get(key)) for key in NNSSL_CONFIGURATION},
        "spacing_style": "onemmiso" if isotropic else "median",
        "resampling_fn_mask": resolved.get("resampling_fn_seg"),
        "resampling_fn_mask_kwargs": deepcopy(resolved.get("resampling_fn_seg_kwargs")),
    }


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the keys, types, shapes and bytes of a state dict, whatever its order and device."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _as_json_holds_it(value: dict[str, Any]) -> dict[str, Any]:
    """Tuples become lists, and keys strings."""
    return json.loads(json.dumps(value))
