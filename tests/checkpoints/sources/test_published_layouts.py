"""Published weights in their own layouts: each is inspected, planned for, and adapted to a dataset of two channels."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2, PrimusV3
from fake_dataset import NAME, fake_plan, write_fake_dataset
from published_layouts import (
    DEPTH,
    EVA_MAE,
    HEADS,
    PATCH,
    WIDTH,
    block,
    eva_mae,
    multitalent,
    nnfoundation_cnn,
    nnfoundation_vit,
    small_res_enc_l,
    ssl3d_cnn,
    ssl3d_primus,
)

from nnssl_plugin.checkpoints.sources.inspection import inspect_file, screen
from nnssl_plugin.checkpoints.sources.layouts import PRIMUS_SCALES
from nnssl_plugin.checkpoints.sources.nnssl_layout import RES_ENC_L, UNET, nnssl_network
from nnssl_plugin.checkpoints.sources.source import NNSSL, NNUNET, read_source
from nnssl_plugin.checkpoints.sources.stems import stems_of, with_stem
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_described, build_network

FILES = {
    "nnFoundation CNN": nnfoundation_cnn,
    "nnFoundation ViT": nnfoundation_vit,
    "SSL3D CNN": ssl3d_cnn,
    "SSL3D CNN, bare": lambda: ssl3d_cnn(bare=True),
    "SSL3D Primus": ssl3d_primus,
}
CHANNELS = 2


@pytest.fixture
def folder(nnunet_environment) -> Path:
    write_fake_dataset(cases=1, channels=CHANNELS)
    return Path(os.environ["nnUNet_preprocessed"], NAME)


@pytest.fixture
def small(monkeypatch):
    small_res_enc_l(monkeypatch)


def saved(content, tmp_path) -> str:
    torch.save(content, tmp_path / "checkpoint_final.pth")
    return str(tmp_path / "checkpoint_final.pth")


def like_and_adapt(path) -> list[int]:
    """The exit codes of the two commands."""
    return [
        main(["plan", "-d", "901", "-n", "like", "--like", path]),
        main(["adapt", "-d", "901", "-w", path, "-p", "like", "-n", "theirs"]),
    ]


@pytest.mark.parametrize("name", FILES)
def test_each_is_inspected_planned_and_adapted(name, folder, small, tmp_path, capsys):
    path = saved(FILES[name](), tmp_path)
    said = screen(inspect_file(path))
    assert "pretraining checkpoint of MIC-DKFZ/nnssl" in said and "CAUTION" not in said
    assert ("every case at its own spacing" in said) == name.startswith("nnFoundation")
    assert like_and_adapt(path) == [0, 0], capsys.readouterr().err
    report = read_json(folder / "like-theirs_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0
    weights = torch.load(folder / "like-theirs_3d_fullres.pth", weights_only=True)["network_weights"]
    plan = read_json(folder / "like.json")
    network = build_network(plan, "3d_fullres", read_json(folder / "dataset.json"))
    network.load_state_dict(weights)
    patch = plan["configurations"]["3d_fullres"]["patch_size"]
    assert torch.isfinite(network(torch.randn(1, CHANNELS, *patch))[0]).all()


def test_a_vit_file_becomes_primus_in_its_own_names(tmp_path):
    source = read_source(saved(nnfoundation_vit(), tmp_path))
    assert source.kind == NNSSL and source.input_channels == 1 and source.provenance["native_spacing"] is True
    assert source.network["class"] == f"{Primus.__module__}.Primus"
    assert source.network["kwargs"] == {
        "embed_dim": WIDTH,
        "patch_embed_size": [8, 8, 8],
        "eva_depth": DEPTH,
        "eva_numheads": HEADS,
        "input_shape": PATCH,
        "init_values": 0.1,
        "scale_attn_inner": True,
        "drop_path_rate": 0.2,
    }
    assert all(key.startswith(("eva.", "down_projection.")) for key in source.weights)
    assert any("the decoder of its MAE was left out" in line for line in source.provenance["taken"])


def test_adapt_names_the_command_that_mends_it_and_that_works(folder, tmp_path, capsys):
    path = saved(nnfoundation_vit(), tmp_path)
    assert main(["adapt", "-d", "901", "-w", path, "-n", "theirs"]) == 2
    said = capsys.readouterr().err
    assert "Primus in pretraining, PlainConvUNet here" in said
    plan = shlex.split(next(line for line in said.splitlines() if "nnssl_plugin plan" in line))
    assert main(plan[1:]) == 0
    assert main(["adapt", "-d", "901", "-w", path, "-p", plan[plan.index("-n") + 1], "-n", "theirs"]) == 0


def test_a_smaller_patch_for_the_vit_is_set_as_the_page_says(folder, tmp_path):
    path, under, patch = saved(nnfoundation_vit(), tmp_path), "configurations.3d_fullres", "[16,8,8]"
    sizes = [f"{under}.patch_size={patch}", f"{under}.architecture.arch_kwargs.input_shape={patch}"]
    assert main(["plan", "-d", "901", "-n", "like", "--like", path, "--set", *sizes]) == 0
    assert main(["adapt", "-d", "901", "-w", path, "-p", "like", "-n", "theirs"]) == 0
    report = read_json(folder / "like-theirs_3d_fullres_report.json")
    assert any("positions 2×2×2 → 2×1×1" in record["reason"] for record in report["tensors"])


@torch.no_grad()
def test_the_adapted_vit_answers_as_the_pretrained_encoder(folder, tmp_path):
    path, theirs = saved(nnfoundation_vit(), tmp_path), eva_mae().eval()
    assert like_and_adapt(path) == [0, 0]
    network = build_network(read_json(folder / "like.json"), "3d_fullres", read_json(folder / "dataset.json")).eval()
    network.load_state_dict(torch.load(folder / "like-theirs_3d_fullres.pth", weights_only=True)["network_weights"])
    image = torch.randn(2, 1, *PATCH)
    tokens, _ = theirs.eva(theirs.down_projection(image).flatten(2).transpose(1, 2))
    (ours,) = Backbone(network, CHANNELS).features(image.expand(-1, CHANNELS, -1, -1, -1))
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sizes_of_the_published_networks():
    """The CNN has 956 tensors and 102 M parameters; of the ViT's 674 M the encoder of 40 blocks takes 551 M."""
    res_enc_l = {"network_class_name": f"{UNET}.ResidualEncoderUNet", **_arguments(RES_ENC_L)}
    cnn = build_described(res_enc_l, 1, "x", classes=1)
    assert len(cnn.state_dict()) == 956 and round(_millions(cnn.parameters())) == 102
    arguments = EVA_MAE | {
        "embed_dim": 1056,
        "encoder_eva_depth": 40,
        "encoder_eva_numheads": 16,
        "input_shape": [192, 192, 192],
    }
    network = nnssl_network(block("PrimusX", arguments, transformer=True, patch=[192] * 3), {})
    vit = build_described({"network_class_name": network["class"], **_arguments(network["kwargs"])}, 1, "x")
    encoder = [p for name, p in vit.named_parameters() if not name.startswith("up_projection.")]
    assert round(_millions(encoder)) == 551


def _arguments(kwargs):
    imported = ("conv_op", "norm_op", "dropout_op", "nonlin")
    return {"arch_kwargs": kwargs, "_kw_requires_import": [key for key in imported if key in kwargs]}


def _millions(parameters):
    return sum(parameter.numel() for parameter in parameters) / 1e6


def test_native_spacing_is_said_and_cannot_be_taken_over(folder, small, tmp_path, capsys):
    path = saved(nnfoundation_cnn(), tmp_path)
    assert main(["plan", "-d", "901", "-n", "like", "--like", path, "--spacing"]) == 2
    assert "cases at their own spacing" in capsys.readouterr().err
    assert like_and_adapt(path) == [0, 0]
    said = capsys.readouterr().out
    assert "the pretraining saw every case at its own spacing" in said and "voxel spacing:" not in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PrimusV2, PrimusV3])
def test_primus_with_a_convolutional_stem_is_known_by_name(kind, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRIMUS_SCALES, "S", (WIDTH, DEPTH, HEADS))
    torch.manual_seed(0)
    theirs = kind(1, WIDTH, (8, 8, 8), 1, DEPTH, HEADS, tuple(PATCH), init_values=0.1, scale_attn_inner=True)
    plan = block(f"{kind.__name__}S", transformer=True, patch=PATCH)
    path = saved({"network_weights": theirs.state_dict(), "nnssl_adaptation_plan": plan}, tmp_path)
    source = read_source(path)
    assert source.network["class"] == f"{kind.__module__}.{kind.__name__}" and source.input_channels == 1
    assert like_and_adapt(path) == [0, 0], capsys.readouterr().err
    report = read_json(folder / "like-theirs_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0
    assert any("input channels 1 → 2" in record["reason"] for record in report["tensors"])


@pytest.mark.parametrize(
    ("kind", "trainer"), [(Primus, "nnUNet_Primus_S_Trainer"), (PrimusV2, "nnUNet_PrimusV2S_Trainer")]
)
def test_primus_that_nnunets_trainers_build_whatever_the_plan_names(kind, trainer, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRIMUS_SCALES, "S", (WIDTH, DEPTH, HEADS))
    content = multitalent() | {"trainer_name": trainer}
    theirs = kind(1, WIDTH, (8, 8, 8), 2, DEPTH, HEADS, tuple(PATCH), init_values=0.1, scale_attn_inner=True)
    path = saved(content | {"network_weights": theirs.state_dict()}, tmp_path)
    source = read_source(path)
    assert source.kind == NNUNET and source.network["class"] == f"{kind.__module__}.{kind.__name__}"
    assert source.network["kwargs"]["drop_path_rate"] == 0.2
    assert like_and_adapt(path) == [0, 0]
    assert read_json(folder / "like-theirs_3d_fullres_report.json")["coverage"]["encoder"] == 1.0


CONTAINERS = ["encoder.stems", "encoder.stem", "stems", "encoder.multi_stem"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_one_of_several_stems_is_chosen_by_name(container, folder, tmp_path, capsys):
    plan = fake_plan(residual=True) | {"plans_name": "like"}
    write_json(folder / "like.json", plan)
    path = saved(multitalent(container), tmp_path)
    source = read_source(path)
    assert source.kind == NNUNET and stems_of(source.weights) == {"035": 1, "351_5": 2, "007": 1}
    report = inspect_file(path)
    assert "one of: 035 (1 channel), 351_5 (2 channels), 007 (1 channel)" in screen(report)
    assert len(report["use"]) == 1 and "--stem ID" in report["use"][0]
    adapt = ["adapt", "-d", "901", "-w", path, "-p", "like", "-n", "theirs"]
    assert main(adapt) == 2
    said = capsys.readouterr().err
    assert "a stem for each dataset of its training" in said and "--stem 035" in said
    assert main([*adapt, "--stem", "9"]) == 2 and main([*adapt, "--stem", "351_5"]) == 0
    written = torch.load(folder / "like-theirs_3d_fullres.pth", weights_only=True)["network_weights"]
    expected = source.weights[f"{container}.351_5.convs.0.conv.weight"]
    assert torch.equal(written["encoder.stem.convs.0.conv.weight"], expected)
    assert read_json(folder / "like-theirs_3d_fullres_report.json")["coverage"]["encoder"] == 1.0


def test_a_network_with_one_stem_has_no_choice(small, tmp_path):
    source = read_source(saved(nnfoundation_cnn(), tmp_path))
    assert stems_of(source.weights) == {} and with_stem(source, None) is source
    assert stems_of({"system.net.convs.0.conv.weight": torch.zeros(4, 1, 3, 3, 3)}) == {}
    with pytest.raises(UserError, match="has one stem, and none called 035"):
        with_stem(source, "035")


def test_arguments_of_another_type_are_refused_in_words(tmp_path):
    content = nnfoundation_vit()
    for value in ("24", [8, 8], [0, 0, 0], None):
        plan = json.loads(json.dumps(content["nnssl_adaptation_plan"]))
        plan["architecture_plans"]["arch_kwargs"]["patch_embed_size"] = value
        path = saved(content | {"nnssl_adaptation_plan": plan}, tmp_path)
        if value is None:
            assert "patch_embed_size" not in read_source(path).network["kwargs"]
        else:
            with pytest.raises(UserError, match="a description of them that cannot be read"):
                read_source(path)
