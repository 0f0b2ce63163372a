"""Files in exactly the layouts of published weights, generated at a size for tests.

Sources: MIC-DKFZ/nnssl, ``AdaptationPlan.serialize``, ``EvaMAE`` and ``get_network_by_name(encoder_only=True)``;
MIC-DKFZ/nnUNet, ``thrp_primusx_finetuning.py``, for the arguments of a ``PrimusX``; MIC-DKFZ/MultiTalent, issues 19 and
20, for its stems. A network that is only named has one size: :func:`small_res_enc_l` makes it smaller.
"""

from typing import Any

import pytest
import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd, PatchDecode, PatchEmbed
from fake_dataset import fake_plan
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_plugin.checkpoints.format.provenance import IMPORTED
from nnssl_plugin.checkpoints.sources import nnssl_layout
from nnssl_plugin.nnunet.plans import build_network

FEATURES, BLOCKS = [4, 8, 8, 8, 8, 8], [1, 1, 1, 1, 1, 1]
WIDTH, HEADS, DEPTH, DECODER_DEPTH = 24, 2, 2, 1
PATCH = [16, 16, 16]
"""Of the transformers; two tokens along every axis."""
EVA_MAE: dict[str, Any] = {
    "input_channels": 1,
    "embed_dim": WIDTH,
    "patch_embed_size": [8, 8, 8],
    "output_channels": 1,
    "encoder_eva_depth": DEPTH,
    "encoder_eva_numheads": HEADS,
    "decoder_eva_depth": DECODER_DEPTH,
    "decoder_eva_numheads": HEADS,
    "input_shape": PATCH,
    "patch_drop_rate": 0.8,
    "init_values": [0.1],
    "scale_attn_inner": True,
}
"""``arch_kwargs`` of nnFoundation's ViT, in the names of nnssl's EvaMAE."""


def small_res_enc_l(patch: pytest.MonkeyPatch) -> None:
    """``ResEncL`` with eight features at most and one block per stage, for as long as the patch lasts."""
    patch.setitem(nnssl_layout.RES_ENC_L, "features_per_stage", FEATURES)
    patch.setitem(nnssl_layout.RES_ENC_L, "n_blocks_per_stage", BLOCKS)


def block(name: str, arguments: dict | None = None, *, transformer: bool = False, patch=(32, 32, 32), **plan) -> dict:
    """nnFoundation's adaptation plan: cases at their own spacing, z-score."""
    configuration = {
        "data_identifier": "nnsslPlans_noresample",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "noresample",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "spacing": None,
        "patch_size": list(patch),
    } | plan
    stem = "down_projection" if transformer else "encoder.stem"
    return {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {
            "dataset_name": "Dataset001_Pretraining",
            "plans_name": "nnsslPlans",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {configuration["spacing_style"]: configuration},
            "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": list(patch),
        "key_to_encoder": "eva" if transformer else "encoder.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": ["down_projection.proj"]
        if transformer
        else [f"{stem}.convs.0.conv", f"{stem}.convs.0.all_modules.0"],
        "key_to_lpe": "eva.pos_embed" if transformer else None,
    }


def res_enc_l(channels: int = 1) -> nn.Module:
    """nnssl's ``get_res_enc_l`` in the size of the moment."""
    torch.manual_seed(3)
    arguments = nnssl_layout.RES_ENC_L
    return get_network_from_plans(
        f"{nnssl_layout.UNET}.ResidualEncoderUNet",
        arguments,
        [key for key in IMPORTED if key in arguments],
        channels,
        1,
        deep_supervision=False,
    )


def eva_mae() -> nn.Module:
    """nnssl's ``EvaMAE``: patch embedding, encoder, mask token, decoder, up-projection."""
    torch.manual_seed(4)
    grid = tuple(size // 8 for size in PATCH)
    options = {"ref_feat_shape": grid, "init_values": 0.1, "scale_attn_inner": True}
    network = nn.Module()
    network.down_projection = PatchEmbed((8, 8, 8), 1, WIDTH)
    network.eva = Eva(WIDTH, DEPTH, HEADS, **options)
    network.up_projection = PatchDecode((8, 8, 8), WIDTH, 1, norm=LayerNormNd, activation=nn.GELU)
    network.decoder = Eva(WIDTH, DECODER_DEPTH, HEADS, **options)
    network.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH))
    nn.init.normal_(network.eva.pos_embed)
    return network


def nnfoundation_cnn() -> dict[str, Any]:
    """The published CNN: ``ResEncL`` without arguments, the whole U-Net of a MAE."""
    return _checkpoint(res_enc_l().state_dict(), block("ResEncL"))


def nnfoundation_vit() -> dict[str, Any]:
    """The published ViT: ``PrimusX`` with EvaMAE's arguments and tensors."""
    return _checkpoint(eva_mae().state_dict(), block("PrimusX", EVA_MAE, transformer=True, patch=PATCH))


def ssl3d_cnn(*, bare: bool = False) -> dict[str, Any]:
    """An encoder alone, in the whole network's names, or as nnssl's ``encoder_only`` network has them (``bare``)."""
    weights = res_enc_l().state_dict()
    prefix = "encoder." if bare else ""
    encoder = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith("encoder.")}
    plan = block("ResEncL", spacing=[1, 1, 1], spacing_style="onemmiso")
    return _checkpoint(encoder, plan | ({"key_to_encoder": "stages"} if bare else {}))


def ssl3d_primus(arguments: dict | None = None) -> dict[str, Any]:
    """A transformer's encoder alone."""
    encoder = {k: v for k, v in eva_mae().state_dict().items() if k.startswith(("eva.", "down_projection."))}
    plan = block("PrimusX", arguments or EVA_MAE, transformer=True, patch=PATCH, spacing=[1, 1, 1])
    plan["pretrain_plan"]["configurations"]["noresample"]["spacing_style"] = "onemmiso"
    return _checkpoint(encoder, plan)


def multitalent(container: str = "encoder.stems") -> dict[str, Any]:
    """A supervised checkpoint of nnU-Net with a stem for each of three datasets, of one, two and one channels."""
    plans, dataset_json = fake_plan(residual=True), _dataset_json(1)
    torch.manual_seed(5)
    network = build_network(plans, "3d_fullres", dataset_json)
    weights = {key: value for key, value in network.state_dict().items() if ".stem." not in key}
    for name, channels in (("035", 1), ("351_5", 2), ("007", 1)):
        stem = build_network(plans, "3d_fullres", _dataset_json(channels)).encoder.stem
        weights |= {f"{container}.{name}.{key}": value for key, value in stem.state_dict().items()}
    return {
        "network_weights": weights,
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": "all", "dataset_json": dataset_json},
        "trainer_name": "MultiTalent_trainer_multistems_4000ep",
        "current_epoch": 4000,
        "logging": {},
        "inference_allowed_mirroring_axes": None,
    }


def _checkpoint(weights: dict[str, torch.Tensor], plan: dict) -> dict[str, Any]:
    return {
        "network_weights": weights,
        "nnssl_adaptation_plan": plan,
        "citations": [{"type": "Pretraining", "name": "MAE", "apa_citations": ["A. Author (2026)."]}],
        "trainer_name": "BaseMAETrainer",
        "current_epoch": 2500,
    }


def _dataset_json(channels: int) -> dict[str, Any]:
    return {
        "channel_names": {str(number): "MR" for number in range(channels)},
        "labels": {"background": 0, "body": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
