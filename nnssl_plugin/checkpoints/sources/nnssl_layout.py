"""What the files of MIC-DKFZ/nnssl, and of nnFoundation and SSL3D in its layout, say of their network and training.

Layouts read in: MIC-DKFZ/nnssl at 7044864, ``adaptation_planning/adaptation_plan.py``, ``architectures/
architecture_registry.py``, ``get_network_by_name.py``, ``evaMAE_module.py`` and ``training/nnsslTrainer/
AbstractTrainer.py``; MIC-DKFZ/nnUNet at 0e49508, ``training/nnUNetTrainer/pretraining/thrp_primusx_finetuning.py``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_plugin.checkpoints.sources.layouts import (
    PRIMUS,
    PRIMUS_DROP_PATH,
    PRIMUS_PATCH,
    Keys,
    keys_of_network,
    named_primus,
)
from nnssl_plugin.io.files import read_json

UNET = "dynamic_network_architectures.architectures.unet"
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
EVA_MAE_NAMES = {
    "encoder_eva_depth": "eva_depth",
    "encoder_eva_numheads": "eva_numheads",
    "use_abs_pos_emb": "use_abs_pos_embed",
}
"""Argument of nnssl's ``EvaMAE`` → that of Primus."""
OF_PRIMUS = (
    "embed_dim",
    "patch_embed_size",
    "eva_depth",
    "eva_numheads",
    "input_shape",
    "num_register_tokens",
    "use_rot_pos_emb",
    "use_abs_pos_embed",
    "mlp_ratio",
    "proj_drop_rate",
    "attn_drop_rate",
    "rope_kwargs",
    "init_values",
    "scale_attn_inner",
)
"""Arguments that EvaMAE and Primus share: channels, the decoder, and the masking of the pretraining are left out."""
MAE_DECODER = ("decoder.", "mask_token", "up_projection.")
"""Of EvaMAE, what comes behind the encoder: the up-projection reads what the MAE's decoder gives."""
NATIVE = "noresample"
"""nnssl's ``spacing_style`` of cases that keep their own spacing."""
ADAPTATION_PLAN = "adaptation_plan.json"


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


def nnssl_network(block: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Class and arguments of the network that nnssl's fine-tuning would build; None for one that is not known here."""
    architecture = block.get("architecture_plans") or {}
    name, arguments = architecture.get("arch_class_name", ""), architecture.get("arch_kwargs")
    if arguments and name in ("PrimusX", "EvaMAE"):
        return _eva_mae(arguments, block, weights)
    if arguments:
        known = {"class": name if "." in name else f"{UNET}.{name}", "kwargs": dict(arguments)}
        return known if "." in name or not name.startswith("Primus") else known | {"class": f"{PRIMUS}.{name}"}
    if name in ("ResEncL", "NoSkipResEncL"):  # the latter differs in its decoder alone
        return {"class": f"{UNET}.ResidualEncoderUNet", "kwargs": dict(RES_ENC_L)}
    return named_primus(name, _primus_shape(block, weights, PRIMUS_PATCH))


def nnssl_provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the nnssl plan of a checkpoint says of its pretraining; fields that it does not state are absent."""
    plan = _mapping(content["nnssl_adaptation_plan"].get("pretrain_plan"))
    name, settings = next(iter(_mapping(plan.get("configurations")).items()), (None, {}))
    arguments, settings = _mapping(content.get("init_args")), _mapping(settings)
    spacing = _list(settings.get("spacing"))
    stated = {
        "method": f"nnssl {content['trainer_name']}" if content.get("trainer_name") else None,
        "data": {"dataset": plan["dataset_name"]} if plan.get("dataset_name") else None,
        "plans_name": plan.get("plans_name"),
        "configuration": arguments.get("configuration_name") or name,
        "normalisation": _list(settings.get("normalization_schemes")),
        "spacing_mm": spacing,
        "native_spacing": True if spacing is None and settings.get("spacing_style") == NATIVE else None,
        "patch_size": _list(settings.get("patch_size")),
        "transpose_forward": _list(plan.get("transpose_forward")),
        "reader": plan.get("image_reader_writer"),
        "citations": list(content.get("citations") or []),
    }
    return {key: value for key, value in stated.items() if value not in (None, [])}


def in_names_of(
    network: Mapping[str, Any] | None, block: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """nnssl's weights under the names of the network itself, without what its MAE has behind a transformer.

    SimCLR and VoCo keep Primus below ``encoder.``; a file of an encoder alone may leave ``encoder.`` out.
    """
    ours, weights = keys_of_network(network), dict(weights)
    weights, notes = _with_encoder_prefix(ours, weights)
    for theirs, name in ((block.get("key_to_encoder"), ours.encoder), (block.get("key_to_stem"), ours.stem)):
        if name is None or not theirs or theirs == name or not _below(theirs, weights):
            continue
        weights = {
            name + key[len(theirs) :] if key.startswith(f"{theirs}.") else key: value for key, value in weights.items()
        }
        notes.append(f"'{theirs}.' is called '{name}.' in the network")
    if ours.encoder == "eva" and _below("decoder", weights):
        kept = {key: value for key, value in weights.items() if not key.startswith(MAE_DECODER)}
        notes.append(f"the decoder of its MAE was left out ({len(weights) - len(kept)} tensors)")
        weights = kept
    return weights, notes


def _with_encoder_prefix(keys: Keys, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of nnssl's ``encoder_only`` network, which has no ``encoder.`` before its stem and stages."""
    prefix = "encoder."
    places = [key.removeprefix(prefix) for key in (keys.encoder, keys.stem) if key and key.startswith(prefix)]
    if not places or _below(prefix[:-1], weights) or not all(_below(place, weights) for place in places):
        return weights, []
    return {prefix + key: value for key, value in weights.items()}, [f"'{prefix}' was put before the keys"]


def _below(prefix: str, weights: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(f"{prefix}.") for key in weights)


def _eva_mae(arguments: Mapping[str, Any], block: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Primus with the encoder of nnssl's ``EvaMAE``, which nnFoundation calls ``PrimusX``.

    The class of that name in dynamic_network_architectures takes a size and no widths.
    """
    renamed = {EVA_MAE_NAMES.get(name, name): value for name, value in arguments.items()}
    ours = {name: renamed[name] for name in OF_PRIMUS if renamed.get(name) is not None}
    if isinstance(ours.get("init_values"), (list, tuple)):  # as nnU-Net's trainer reads it
        ours["init_values"] = ours["init_values"][0]
    patch = ours.get("patch_embed_size", PRIMUS_PATCH)
    shape = _primus_shape(block, weights, patch)
    return {"class": f"{PRIMUS}.Primus", "kwargs": ours | {"input_shape": shape, "drop_path_rate": PRIMUS_DROP_PATH}}


def _primus_shape(block: Mapping[str, Any], weights: Mapping[str, Tensor], embedded: Any) -> list[int]:
    """The patch of the pretraining in voxels: the candidate whose token grid the learned positions fill."""
    positions = weights.get(block.get("key_to_lpe") or "eva.pos_embed")
    configurations = _mapping(_mapping(block.get("pretrain_plan")).get("configurations"))
    arguments = _mapping(_mapping(block.get("architecture_plans")).get("arch_kwargs"))
    candidates = [_list(arguments.get("input_shape"))]
    candidates += [_list(_mapping(entry).get("patch_size")) for entry in configurations.values()]
    candidates = [shape for shape in [*candidates, _list(block.get("recommended_downstream_patchsize"))] if shape]
    if positions is None:
        return candidates[0] if candidates else [160, 160, 160]
    tokens = positions.shape[1]
    side = round(tokens ** (1 / 3))
    cube = [side * patch for patch in embedded]
    fitting = [
        shape
        for shape in candidates
        if math.prod(n // patch for n, patch in zip(shape, embedded, strict=True)) == tokens
    ]
    return (fitting or [cube])[0]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list | None:
    return None if value is None or isinstance(value, str) else list(getattr(value, "tolist", lambda: value)())
