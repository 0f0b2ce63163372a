"""What nnssl and the development versions of nnU-Net and nnDetection ask of a checkpoint, written anew from their code.

- MIC-DKFZ/nnssl, ``src/nnssl/adaptation_planning/adaptation_plan.py`` (``AdaptationPlan.from_dict``),
  ``experiment_planning/experiment_planners/plan.py`` (``Plan.from_dict``) and ``training/nnsslTrainer/
  AbstractTrainer.py`` (``verify_adaptation_plans``): the block's fields, then a strict load of encoder and stem.
- MIC-DKFZ/nnUNet, ``nnunetv2/experiment_planning/like_nnssl.py`` (``preprocess_like_nnssl``, ``plan_like_dynamic``)
  and ``training/nnUNetTrainer/pretraining/pretrainedTrainer.py``: read with ``weights_only=True``.
- MIC-DKFZ/nnDetection at commit d2f83c4, ``nndet/ptmodule/detr/ResEnc_BoxDETR_v002.py`` and
  ``Primus_BoxDETR_v0002.py``, ``load_custom_state_dict``: strict loads of two parts, found by the starts of keys.
"""

import pydoc

import pytest
import torch
from fake_dataset import fake_plan
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from small_pretraining import ONE_STEP, pretrain_one_step
from small_primus import with_primus

from nnssl_plugin.checkpoints.format.provenance import nnssl_adaptation_plan
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.methods.mae.trainer import MAEPretrainer
from nnssl_plugin.nnunet.plans import build_network

BLOCK = {
    "architecture_plans",
    "pretrain_plan",
    "pretrain_num_input_channels",
    "recommended_downstream_patchsize",
    "key_to_encoder",
    "key_to_stem",
    "keys_to_in_proj",
    "key_to_lpe",
}
PLAN = {
    "dataset_name",
    "plans_name",
    "original_median_spacing_after_transp",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "configurations",
    "experiment_planner_used",
}
CONFIGURATION = {
    "data_identifier",
    "preprocessor_name",
    "spacing_style",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_mask",
    "resampling_fn_mask_kwargs",
    "spacing",
    "patch_size",
}
ARCHITECTURE = {
    "n_stages",
    "features_per_stage",
    "conv_op",
    "kernel_sizes",
    "strides",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "conv_bias",
    "norm_op",
    "norm_op_kwargs",
    "dropout_op",
    "dropout_op_kwargs",
    "nonlin",
    "nonlin_kwargs",
}
"""Fields of nnssl's dataclasses, which take no others."""
MAE = {"trainer_class": MAEPretrainer, "pretraining": ONE_STEP | {"warmup_epochs": 0}}
LIBRARY = "dynamic_network_architectures.architectures.unet."


@pytest.fixture(scope="module", params=[True, False], ids=["ResidualEncoderUNet", "PlainConvUNet"])
def checkpoint(request, tmp_path_factory):
    """The checkpoint itself and its --format nnssl, as ``torch.load(weights_only=True)`` gives them."""
    path = pretrain_one_step(tmp_path_factory.mktemp("pretraining"), residual=request.param)
    exported = export_checkpoint(path, tmp_path_factory.mktemp("export") / "nnssl", layout="nnssl").folder
    return [torch.load(file, weights_only=True) for file in (path, exported / "checkpoint_final.pth")]


def rebuild(architecture: dict, channels: int):
    """nnssl's ``get_network_from_plans`` for its dynamic architectures: a bare class name, looked up in the library."""
    name, required = architecture["arch_class_name"], architecture["arch_kwargs_requiring_import"]
    assert name in ("ResidualEncoderUNet", "PlainConvUNet")
    assert all(pydoc.locate(architecture["arch_kwargs"][key]) for key in required if architecture["arch_kwargs"][key])
    return get_network_from_plans(
        LIBRARY + name, architecture["arch_kwargs"], required, channels, 2, allow_init=False, deep_supervision=False
    )


def below(weights, key):
    return {name[len(key) + 1 :]: value for name, value in weights.items() if name.startswith(f"{key}.")}


def test_the_block_has_nnssls_fields_and_no_others(checkpoint):
    for content in checkpoint:
        block = content["nnssl_adaptation_plan"]
        assert set(block) == BLOCK and set(block["pretrain_plan"]) == PLAN
        assert [set(value) for value in block["pretrain_plan"]["configurations"].values()] == [CONFIGURATION]
        if block["architecture_plans"]["arch_class_name"] == "ResidualEncoderUNet":  # nnssl's class has no n_conv_…
            assert set(block["architecture_plans"]["arch_kwargs"]) == ARCHITECTURE


def test_its_keys_locate_encoder_and_stem_which_load_strictly(checkpoint):
    for content in checkpoint:
        block, weights = content["nnssl_adaptation_plan"], content["network_weights"]
        network = rebuild(block["architecture_plans"], block["pretrain_num_input_channels"])
        assert block["key_to_encoder"] == network.key_to_encoder and block["key_to_stem"] == network.key_to_stem
        network.get_submodule(network.key_to_encoder).load_state_dict(below(weights, block["key_to_encoder"]))
        network.get_submodule(network.key_to_stem).load_state_dict(below(weights, block["key_to_stem"]))
        for key, value in network.state_dict().items():
            if key.startswith((block["key_to_encoder"], block["key_to_stem"])):
                assert torch.equal(value, weights[key]), key


def test_nnunets_fine_tuning_finds_what_it_reads(checkpoint):
    for content in checkpoint:
        block, weights = content["nnssl_adaptation_plan"], content["network_weights"]
        configuration = next(iter(block["pretrain_plan"]["configurations"].values()))
        assert configuration["patch_size"] == [16, 16, 16] and configuration["spacing"] == [1.0, 1.0, 1.0]
        assert block["recommended_downstream_patchsize"] == [16, 16, 16] and block["pretrain_num_input_channels"] == 2
        projections = [weights[f"{key}.weight"] for key in block["keys_to_in_proj"]]
        assert all(weight.shape[1] == 2 and torch.equal(weight, projections[0]) for weight in projections)
        for citation in sorted(content["citations"], key=lambda entry: entry.get("type", "")):
            assert citation["type"] and citation["name"] and all(citation["apa_citations"])


def nndetections_parts(content, wanted_channels):
    """State dicts of encoder and stem as nnDetection makes them: whatever starts with the block's keys, without every
    occurrence of them; for more channels than the pretraining's, the first projection repeated and scaled."""
    block, parts = content["nnssl_adaptation_plan"], []
    for key in (block["key_to_encoder"], block["key_to_stem"]):
        weights = {name: value for name, value in content["network_weights"].items() if name.startswith(key)}
        if key == block["key_to_stem"] and wanted_channels > block["pretrain_num_input_channels"]:
            first = weights[f"{block['keys_to_in_proj'][0]}.weight"]
            repeated = first.repeat(1, wanted_channels, 1, 1, 1) / wanted_channels
            weights |= {f"{name}.weight": repeated for name in block["keys_to_in_proj"]}
        parts.append({name.replace(key, "").removeprefix("."): value for name, value in weights.items()})
    return parts


@pytest.mark.parametrize("channels, wanted", [(1, 1), (1, 3), (2, 2)])
def test_nndetections_residual_encoder_loads_strictly(tmp_path, channels, wanted):
    path = pretrain_one_step(tmp_path, residual=True, channels=channels, **MAE)
    exported = export_checkpoint(path, tmp_path / "nnssl", layout="nnssl").folder
    content = torch.load(exported / "checkpoint_final.pth", weights_only=True)
    encoder = rebuild(content["nnssl_adaptation_plan"]["architecture_plans"], wanted).encoder  # its backbone.resenc
    stages, stem = nndetections_parts(content, wanted)
    encoder.stages.load_state_dict(stages)
    encoder.stem.load_state_dict(stem)
    image = torch.rand(1, channels, 16, 16, 16).expand(-1, wanted, -1, -1, -1)
    pretrained = rebuild(content["nnssl_adaptation_plan"]["architecture_plans"], channels)
    pretrained.load_state_dict(content["network_weights"], strict=False)
    for mine, other in zip(pretrained.encoder(image[:, :channels]), encoder(image), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_nndetections_primus_loads_strictly(tmp_path):
    path = pretrain_one_step(tmp_path, network=with_primus, **MAE)
    exported = export_checkpoint(path, tmp_path / "nnssl", layout="nnssl").folder
    content = torch.load(exported / "checkpoint_final.pth", weights_only=True)
    block = content["nnssl_adaptation_plan"]
    network = build_network(
        with_primus(fake_plan()), "3d_fullres", {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0}}
    )
    transformer, stem = nndetections_parts(content, 2)
    network.eva.load_state_dict(transformer)
    network.down_projection.load_state_dict(stem)
    configuration = next(iter(block["pretrain_plan"]["configurations"].values()))
    assert configuration["patch_size"] == [16, 16, 16] and stem["proj.weight"].shape[2:] == (4, 4, 4)
    assert block["key_to_lpe"] == "eva.pos_embed" and "pos_embed" in transformer


def test_another_networks_block_names_its_class_in_full():
    plans = fake_plan()
    network = build_network(plans, "3d_fullres", {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}})
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "my_package.MyNet"
    block = nnssl_adaptation_plan(plans, "3d_fullres", network, 1)
    assert block["architecture_plans"]["arch_class_name"] == "my_package.MyNet"


def test_masks_are_resampled_as_labels_were_and_the_style_follows_the_spacing():
    plans = fake_plan()
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {
        "spacing": [3.0, 1.0, 1.0],
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1},
    }
    network = build_network(plans, "3d_fullres", {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}})
    found = nnssl_adaptation_plan(plans, "3d_fullres", network, 1)["pretrain_plan"]["configurations"]["3d_fullres"]
    assert found["resampling_fn_mask"] == "resample_data_or_seg_to_shape" and found["spacing_style"] == "median"
    assert found["resampling_fn_mask_kwargs"] == {"is_seg": True, "order": 1}
