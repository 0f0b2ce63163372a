"""Weights are recognised by the content of their file, whoever wrote it, and described in the same terms."""

import io

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from fake_dataset import fake_plan
from safetensors.torch import save_file

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import (
    describe_input,
    describe_network,
    describe_pretraining,
    nnssl_adaptation_plan,
)
from nnssl_plugin.checkpoints.sources.layouts import PRIMUS_PATCH, first_layer_channels, keys_of_network
from nnssl_plugin.checkpoints.sources.nnssl_layout import RES_ENC_L, nnssl_network
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.plans import build_network

DATASET = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1}, "numTraining": 12}
STOCK = {
    "optimizer_state": {},
    "grad_scaler_state": None,
    "_best_ema": 0.5,
    "current_epoch": 7,
    "trainer_name": "nnUNetTrainer",
    "inference_allowed_mirroring_axes": (0, 1, 2),
}
"""The entries that nnU-Net's ``save_checkpoint`` writes beside weights, log and arguments."""


@pytest.fixture(params=[False, True], ids=["PlainConvUNet", "ResidualEncoderUNet"])
def plans(request) -> dict:
    return fake_plan(residual=request.param)


@pytest.fixture
def network(plans):
    return build_network(plans, "3d_fullres", DATASET)


def stock_checkpoint(network, plans, **changes) -> dict:
    arguments = {
        "plans": plans,
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": DATASET,
        "device": torch.device("cpu"),
    }
    log = {"train_losses": [np.float64(0.5)], "ema_fg_dice": [np.float32(0.8)]}
    return STOCK | {"network_weights": network.state_dict(), "init_args": arguments, "logging": log} | changes


def nnssl_block(name, *, encoder="encoder.stages", stem="encoder.stem", positions=None, patch=(160, 160, 160)):
    """The adaptation plan as nnssl serialises it, with a named architecture instead of arguments."""
    configuration = {
        "data_identifier": "nnsslPlans_onemmiso",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "spacing": [1, 1, 1],
        "patch_size": patch,
    }
    return {
        "architecture_plans": {"arch_class_name": name, "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "plans_name": "nnsslPlans",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "configurations": {"onemmiso": configuration},
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": encoder,
        "key_to_stem": stem,
        "keys_to_in_proj": [f"{stem}.proj"],
        "key_to_lpe": positions,
    }


def small_primus(grid=(3, 2, 2)) -> Primus:
    shape = tuple(n * patch for n, patch in zip(grid, PRIMUS_PATCH, strict=True))
    return Primus(
        1, 24, PRIMUS_PATCH, 1, eva_depth=1, eva_numheads=2, input_shape=shape, init_values=0.1, scale_attn_inner=True
    )


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_checkpoint_of_this_package(network, plans, tmp_path):
    trained = ["encoder.", "decoder.stages."]
    provenance = describe_pretraining(
        method="toy",
        settings={},
        training={},
        plans=plans,
        configuration="3d_fullres",
        dataset_json=DATASET,
        trained=trained,
        steps=5,
        cases=4,
        citations=[],
        licence="CC0",
    )
    block = nnssl_adaptation_plan(plans, "3d_fullres", network, 2)
    save_checkpoint(
        stock_checkpoint(network, plans, provenance=provenance, nnssl_adaptation_plan=block), tmp_path / "own.pth"
    )
    source = read_source(tmp_path / "own.pth")
    assert_same(source.weights, network.state_dict())
    assert source.kind == "nnssl_plugin" and source.trained == tuple(trained) and source.provenance == provenance
    assert source.network == provenance["network"] and source.input_channels == 2
    assert (source.key_to_encoder, source.key_to_stem) == (network.key_to_encoder, network.key_to_stem)
    assert source.plans["plans_name"] == plans["plans_name"] and source.configuration == "3d_fullres"
    assert source.dataset_json == DATASET


def test_a_stock_checkpoint_describes_itself(network, plans, tmp_path):
    torch.save(stock_checkpoint(network, plans), tmp_path / "checkpoint_final.pth")
    source = read_source(tmp_path / "checkpoint_final.pth")
    assert source.kind == "nnunet" and source.trained is None
    assert_same(source.weights, network.state_dict())
    assert source.network == describe_network(plans, "3d_fullres") and source.input_channels == 2
    assert describe_input(plans, "3d_fullres", DATASET).items() <= source.provenance.items()
    assert source.provenance["data"] == {"dataset": plans["dataset_name"], "cases": 12}
    assert source.content["current_epoch"] == 7


def test_a_stock_checkpoint_finds_its_plan_two_folders_up(network, plans, tmp_path):
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", DATASET)
    torch.save(STOCK | {"network_weights": network.state_dict()}, folder / "fold_0" / "checkpoint_final.pth")
    source = read_source(folder / "fold_0" / "checkpoint_final.pth")
    assert source.kind == "nnunet" and source.configuration == "3d_fullres" and source.dataset_json == DATASET
    assert source.network == describe_network(plans, "3d_fullres")


def test_a_stock_checkpoint_with_an_unusable_plan_says_so(network, plans, tmp_path):
    broken = {**plans, "configurations": {"3d_fullres": {"inherits_from": "absent"}}}
    torch.save(stock_checkpoint(network, broken), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"plan of .*cannot be used"):
        read_source(tmp_path / "a.pth")


def test_the_keys_of_known_networks_are_the_librarys_own(network, plans):
    keys = keys_of_network(describe_network(plans, "3d_fullres"))
    assert (keys.encoder, keys.stem) == (network.key_to_encoder, network.key_to_stem)
    assert first_layer_channels(network.state_dict(), keys.stem) == 2
    primus, keys = small_primus(), keys_of_network({"class": "x.Primus", "kwargs": {}})
    assert (keys.encoder, keys.stem, keys.positions) == (primus.key_to_encoder, primus.key_to_stem, primus.key_to_lpe)
    assert first_layer_channels(primus.state_dict(), keys.stem) == 1


def test_an_nnssl_checkpoint_of_a_convolutional_network(tmp_path):
    weights = {"encoder.stem.convs.0.conv.weight": torch.zeros(32, 1, 3, 3, 3), "projector.weight": torch.ones(2)}
    torch.save(
        {
            "network_weights": {f"module.{key}": value for key, value in weights.items()},
            "current_epoch": 1000,
            "trainer_name": "BaseMAETrainer",
            "init_args": {"configuration_name": "onemmiso"},
            "nnssl_adaptation_plan": nnssl_block("ResEncL"),
        },
        tmp_path / "openmind.pth",
    )
    source = read_source(tmp_path / "openmind.pth")
    assert source.kind == "nnssl" and source.plans is None and source.trained is None
    assert_same(source.weights, weights)
    assert source.network["kwargs"] == RES_ENC_L and source.input_channels == 1
    assert source.provenance["normalisation"] == ["ZScoreNormalization"]
    assert source.provenance["spacing_mm"] == [1, 1, 1] and source.provenance["method"] == "nnssl BaseMAETrainer"
    assert source.provenance["taken"] == ["without 'module.'"]


def test_an_nnssl_checkpoint_with_arguments_of_its_network(network, plans, tmp_path):
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    block = nnssl_block(architecture["network_class_name"].rpartition(".")[2])
    block["architecture_plans"]["arch_kwargs"] = architecture["arch_kwargs"]
    torch.save({"network_weights": network.state_dict(), "nnssl_adaptation_plan": block}, tmp_path / "a.pth")
    assert read_source(tmp_path / "a.pth").network == describe_network(plans, "3d_fullres")


@pytest.mark.parametrize("prefix", ["", "encoder."], ids=["MAE", "SimCLR and VoCo"])
def test_an_nnssl_checkpoint_of_primus_comes_in_the_networks_own_names(prefix, tmp_path):
    primus = small_primus()
    weights = {prefix + key: value for key, value in primus.state_dict().items()}
    block = nnssl_block(
        "PrimusM",
        encoder=f"{prefix}eva",
        stem=f"{prefix}down_projection",
        positions=f"{prefix}eva.pos_embed",
        patch=(24, 16, 16),
    )
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": block}, tmp_path / "primus.pth")
    source = read_source(tmp_path / "primus.pth")
    for key, value in primus.state_dict().items():
        if key.startswith(("eva.", "down_projection.")):
            assert torch.equal(source.weights[key], value)
    assert (source.key_to_encoder, source.key_to_lpe) == ("eva", "eva.pos_embed")
    assert source.network["kwargs"]["input_shape"] == [24, 16, 16]  # not the recommended 160: the positions say so


def test_primus_positions_that_no_stated_patch_fits_are_taken_as_a_cube():
    weights = {"eva.pos_embed": torch.zeros(1, 27, 24)}
    assert nnssl_network(nnssl_block("PrimusM"), weights)["kwargs"]["input_shape"] == [24, 24, 24]


def test_an_unknown_architecture_of_nnssl_is_unknown(tmp_path):
    torch.save(
        {"network_weights": {"a": torch.zeros(1)}, "nnssl_adaptation_plan": nnssl_block("Other")}, tmp_path / "a.pth"
    )
    source = read_source(tmp_path / "a.pth")
    assert source.network is None and source.key_to_encoder == "encoder.stages" and source.input_channels == 1


WEIGHTS = {"stem.weight": torch.arange(3.0), "stem.bias": torch.ones(2)}


WRAPPERS = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda w: {"model": w, "args": {"lr": 0.1}},
    "network_weights": lambda w: {"network_weights": w},
    "model_state_dict": lambda w: {"model_state_dict": w},
    "nested": lambda w: {"model": {"state_dict": w}},
    "teacher": lambda w: {"teacher": w, "student": {key: -value for key, value in w.items()}},
    "student": lambda w: {"student": w},
    "backbone": lambda w: {"backbone": w, "teacher": {"head.weight": torch.zeros(9)}},
    "with a number": lambda w: {**w, "epoch": 3},
}
PREFIXES = [
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "teacher.",
    "student.",
    "backbone.",
    "module.teacher.backbone.",
]


@pytest.mark.parametrize(
    "wrapper, prefix",
    [
        *(("state_dict", prefix) for prefix in PREFIXES),
        *((wrapper, "module.student.") for wrapper in WRAPPERS),
    ],
)
def test_wrappers_and_prefixes_are_taken_off(wrapper, prefix, tmp_path):
    torch.save(WRAPPERS[wrapper]({prefix + key: value for key, value in WEIGHTS.items()}), tmp_path / "a.pth")
    source = read_source(tmp_path / "a.pth")
    assert source.kind == "plain" and source.network is None and source.trained is None
    assert_same(source.weights, WEIGHTS)


def test_the_teacher_is_taken_before_the_student_and_said(tmp_path):
    both = {
        **{f"teacher.{key}": value for key, value in WEIGHTS.items()},
        **{f"student.{key}": -value for key, value in WEIGHTS.items()},
        "queue": torch.zeros(4),
    }
    torch.save({"state_dict": both}, tmp_path / "a.pth")
    source = read_source(tmp_path / "a.pth")
    assert_same(source.weights, WEIGHTS)
    assert any(
        "'teacher.' was taken, 'queue', 'student' left out (3 tensors)" in line for line in source.provenance["taken"]
    )


def test_a_backbone_beside_heads_called_teacher_and_student_is_the_network(tmp_path):
    mixed = {
        **{f"module.backbone.{key}": value for key, value in WEIGHTS.items()},
        "module.teacher.layer1.0.weight": torch.zeros(4),
        "module.student.layer1.0.weight": torch.zeros(4),
    }
    torch.save({"state_dict": mixed}, tmp_path / "a.pth")
    assert_same(read_source(tmp_path / "a.pth").weights, WEIGHTS)


def test_a_compiled_part_inside_a_network_loses_its_extra_name(tmp_path):
    torch.save({"encoder._orig_mod.stem.weight": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_source(tmp_path / "a.pth").weights) == ["encoder.stem.weight"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "weights under 'state_dict', 'model'"),
        ({"generator": WEIGHTS, "discriminator": WEIGHTS}, "'generator', 'discriminator'"),
        ({"epoch": 3, "lr": 0.1}, "'epoch', 'lr'"),
        ({}, "none"),
        ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "the tensor a twice"),
    ],
    ids=["two", "unknown names", "no tensors", "empty", "twice"],
)
def test_ambiguous_files_are_refused_with_what_is_there(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        read_source(tmp_path / "a.pth")


def test_safetensors(tmp_path):
    save_file(
        {f"module.{key}": value for key, value in WEIGHTS.items()},
        tmp_path / "a.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "without_ending").write_bytes((tmp_path / "a.safetensors").read_bytes())
    for name in ("a.safetensors", "without_ending"):
        source = read_source(tmp_path / name)
        assert source.kind == "safetensors" and source.content["metadata"] == {"format": "pt"}
        assert_same(source.weights, WEIGHTS)


def test_the_format_before_pytorch_1_6(network, plans, tmp_path):
    torch.save(stock_checkpoint(network, plans), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same(read_source(tmp_path / "a.pth").weights, network.state_dict())


def test_tensors_that_share_their_memory_still_do(tmp_path):
    network = build_network(fake_plan(), "3d_fullres", DATASET)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    weights = read_source(tmp_path / "a.pth").weights
    name = "stages.0.0.convs.0.conv.weight"
    assert weights[f"encoder.{name}"].data_ptr() == weights[f"decoder.encoder.{name}"].data_ptr()


def test_what_adapt_wrote_is_described_by_the_plan_beside_it(network, plans, tmp_path):
    block = {"configuration": "3d_fullres", "weights": "nnUNetPlans-toy_3d_fullres.pth"}
    write_json(tmp_path / "nnUNetPlans-toy.json", {**plans, "plans_name": "nnUNetPlans-toy", "finetuning": block})
    write_json(tmp_path / "nnUNetPlans.json", plans)
    save_checkpoint(
        {
            "network_weights": network.state_dict(),
            "adaptation": {"loaded": ["encoder.a"]},
            "provenance": {"method": "toy", "network": {"class": "another", "kwargs": {}}},
        },
        tmp_path / "nnUNetPlans-toy_3d_fullres.pth",
    )
    source = read_source(tmp_path / "nnUNetPlans-toy_3d_fullres.pth")
    assert source.kind == "nnssl_plugin" and source.trained == ("encoder.a",) and source.input_channels == 2
    assert source.network == describe_network(plans, "3d_fullres") and source.configuration == "3d_fullres"


def test_missing_files_and_other_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="There is no checkpoint"):
        read_source(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="not one that export wrote"):
        read_source(tmp_path)


def test_reading_leaves_the_file_alone_and_takes_any_path(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS}, buffer)
    (tmp_path / "a b ü.pt").write_bytes(buffer.getvalue())
    (tmp_path / "link.pth").symlink_to("a b ü.pt")
    monkeypatch.chdir(tmp_path)
    for name in ("a b ü.pt", "link.pth"):
        assert_same(read_source(name).weights, WEIGHTS)
    assert (tmp_path / "a b ü.pt").read_bytes() == buffer.getvalue()
