"""Plans with SwinUNETR, and weights for it: the preset's patch, other channels and classes, published layouts."""

import os
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from small_swin import ARGUMENTS, with_swin

from nnssl_plugin.checkpoints.adaptation import fitting_tables
from nnssl_plugin.checkpoints.adaptation.adapt import HEAD, MISSING, adapt_weights
from nnssl_plugin.checkpoints.adaptation.like import training_bytes
from nnssl_plugin.checkpoints.sources.mappings import read_mapping, shipped_mappings
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import freeze_the_rest, optimisation_for, parameter_groups
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.family import parts_of
from nnssl_plugin.nnunet.plan_edits import write_edited_plan
from nnssl_plugin.nnunet.plans import build_network

UNDER = "configurations.3d_fullres"
SMALL = [f"{UNDER}.architecture.arch_kwargs.{name}={str(value).lower()}" for name, value in ARGUMENTS.items()]


def dataset_json(channels=1, classes=2):
    return {
        "channel_names": {str(c): "MR" for c in range(channels)},
        "labels": {"background": 0} | {f"organ{n}": n for n in range(1, classes)},
    }


def network_of(plan=None, *, seed=0, channels=1, classes=2):
    torch.manual_seed(seed)
    return build_network(plan or with_swin(fake_plan()), "3d_fullres", dataset_json(channels, classes))


@pytest.fixture
def folder(nnunet_environment) -> Path:
    write_fake_dataset(cases=1)
    return Path(os.environ["nnUNet_preprocessed"], NAME)


def planned(folder, patch):
    plan = fake_plan()
    plan["configurations"]["3d_fullres"]["patch_size"] = patch
    write_json(folder / "nnUNetPlans.json", plan)


def table(tmp_path, name="voco-b"):
    """A shipped table for a network of the size of these tests."""
    mapping = read_mapping(name)
    content = read_json(Path(mapping_file(name))) | {"name": "small"}
    content["network"]["kwargs"] = {**ARGUMENTS, "use_v2": mapping.network["kwargs"]["use_v2"]}
    write_json(tmp_path / "table.json", content)
    return str(tmp_path / "table.json")


def mapping_file(name):
    from importlib import resources

    return str(resources.files("nnssl_plugin.checkpoints.sources") / "tables" / f"{name}.json")


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ([40, 56, 100], [32, 64, 96]),
        ([96, 160, 160], [96, 160, 160]),
        ([16, 20, 12], [32, 64, 32]),  # a single voxel at the coarsest stage cannot be normalised
        ([48, 48, 80], [32, 32, 64]),  # 48 is as near to 32 as to 64
    ],
)
def test_the_preset_fits_the_patch(folder, patch, expected):
    planned(folder, patch)
    assert main(["plan", "-d", "901", "-n", "swin", "--preset", "swinunetr-b", "med3dinsight", "--set", *SMALL]) == 0
    configuration = read_json(folder / "swin.json")["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == expected
    assert configuration["architecture"]["arch_kwargs"].items() >= ARGUMENTS.items()


@pytest.mark.parametrize(
    ("patch", "said", "remedy"),
    [
        (
            "[64,48,32]",
            r"\[64, 48, 32\] .* not divisible by the network's strides \[32, 32, 32\]",
            "patch_size=[64,32,32]",
        ),
        ("[32,32,32]", r"\[32, 32, 32\] .* a single voxel", "patch_size=[64,32,32]"),
    ],
)
def test_a_patch_that_does_not_fit_is_explained(folder, patch, said, remedy):
    with pytest.raises(UserError, match=said) as error:
        write_edited_plan("901", "swin", presets=["swinunetr-b"], assignments=[*SMALL, f"{UNDER}.patch_size={patch}"])
    assert remedy in error.value.remedy and not (folder / "swin.json").exists()


def test_every_table_of_it_names_a_network_that_a_plan_can_build():
    for name in shipped_mappings():
        network = read_mapping(name).network
        if network["class"].endswith(".SwinUNETR"):
            built = build_network(
                with_swin(fake_plan(), **network["kwargs"]), "3d_fullres", dataset_json(), device="meta"
            )
            assert network["class"] == f"{type(built).__module__}.{type(built).__name__}"


def test_one_channel_becomes_four_with_other_classes():
    source, target = network_of().double(), network_of(seed=1, channels=4, classes=5).double()
    state, report = adapt_weights(source.state_dict(), target, trained=None)
    target.load_state_dict(state)
    assert [report.coverage(part) for part in ("encoder", "decoder", "head")] == [1.0, 1.0, 0.0]
    assert {record.keys[0]: record.reason for record in report.tensors if record.reason} == {
        "swinViT.patch_embed.proj.weight": "input channels 1 → 4",
        "encoder1.layer.conv1.conv.weight": "input channels 1 → 4",
        "encoder1.layer.conv3.conv.weight": "input channels 1 → 4",
        "out.conv.conv.weight": HEAD,
        "out.conv.conv.bias": HEAD,
    }
    x = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for name in ("swinViT", "encoder1"):
            ours, theirs = (n.get_submodule(name)(x.expand(-1, c, -1, -1, -1)) for n, c in ((target, 4), (source, 1)))
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        ({"depths": [3, 1, 1, 2]}, {"new block: the checkpoint has fewer in this place"}),
        (
            {"window_size": 4},
            {
                "shape 125×1 in the checkpoint, 343×1 here",
                "shape 125×2 in the checkpoint, 343×2 here",
                "shape 27×27 in the checkpoint, 64×64 here",
            },
        ),  # the relative positions, and their index
    ],
)
def test_what_has_no_counterpart_is_said(arguments, reasons):
    source, target = network_of(), network_of(with_swin(fake_plan(), **arguments), seed=1)
    _, report = adapt_weights(source.state_dict(), target, trained=None)
    assert {record.reason for record in report.initialised() if record.part == "encoder"} == reasons


def test_weights_of_another_family_are_not_loaded():
    unet, swin = network_of(fake_plan()), network_of()
    for source, target in ((unet, swin), (swin, unet)):
        _, report = adapt_weights(source.state_dict(), target, trained=None)
        assert report.coverage("encoder") == 0.0
        assert any("the checkpoint holds a" in r.reason and "SwinUNETR" in r.reason for r in report.initialised())


def test_published_weights_reach_the_plan_that_is_fine_tuned(folder, tmp_path, capsys):
    """VoCo's layout: a backbone with the transformer and the blocks behind it, and heads beside it."""
    weights = network_of(seed=3).state_dict()
    published = {
        f"module.backbone.{key.replace('swinViT.', 'swin_vit.')}": value
        for key, value in weights.items()
        if key.startswith(("swinViT.", "encoder"))
    }
    torch.save({"state_dict": published | {"module.student.0.weight": torch.zeros(2)}}, file := tmp_path / "voco.pt")
    given = ["--mapping", table(tmp_path)]
    assert main(["plan", "-d", "901", "-n", "swin", "--like", str(file), *given]) == 0
    assert read_json(folder / "swin.json")["configurations"]["3d_fullres"]["patch_size"] == [64, 32, 32]
    assert "patch size: 16×16×16 planned → 64×32×32 here" in capsys.readouterr().out
    assert main(["adapt", "-d", "901", "-p", "swin", "-w", str(file), "-n", "voco", *given]) == 0
    report = read_json(folder / "swin-voco_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0 and 0.5 < report["coverage"]["decoder"] < 1.0
    state = torch.load(folder / "swin-voco_3d_fullres.pth", weights_only=True)["network_weights"]
    fresh = network_of()
    fresh.load_state_dict(state)
    loaded = [key for key in state if key.startswith(("swinViT.", "encoder10."))]
    assert all(torch.equal(state[key], weights[key]) for key in loaded)
    assert {record["reason"] for record in report["tensors"] if record["keys"][0].startswith("decoder")} == {MISSING}


def test_the_first_version_fits_its_own_table_alone(folder, tmp_path, capsys):
    """The layout of Tang et al. 2022: the bare transformer."""
    first = network_of(with_swin(fake_plan(), use_v2=False), seed=3)
    published = {
        f"module.{key.removeprefix('swinViT.').replace('.mlp.linear', '.mlp.fc')}": value
        for key, value in first.state_dict().items()
        if key.startswith("swinViT.")
    }
    torch.save({"state_dict": published}, file := tmp_path / "ssl.pt")
    given = ["-w", str(file), "--mapping", table(tmp_path, "swinunetr-ssl")]
    write_edited_plan("901", "second", presets=["swinunetr-b"], assignments=SMALL)
    assert main(["adapt", "-d", "901", "-p", "second", "-n", "x", *given]) == 2
    assert "use_v2 is false in pretraining, true here" in capsys.readouterr().err
    write_edited_plan("901", "first", source="second", assignments=[f"{UNDER}.architecture.arch_kwargs.use_v2=false"])
    assert main(["adapt", "-d", "901", "-p", "first", "-n", "x", *given]) == 0
    assert read_json(folder / "first-x_3d_fullres_report.json")["coverage"]["encoder"] == 1.0


def test_a_table_of_the_wrong_version_is_refused_with_the_one_that_fits(folder, tmp_path, capsys, monkeypatch):
    """The table of the first version on weights of the second: more than half of them would find no place."""
    weights = network_of(seed=3).state_dict()  # the second version
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in weights.items() if k.startswith("swinViT.")}}, tmp_path / "a.pt"
    )
    for name in ("voco-b", "swinunetr-ssl"):  # tables of networks of the size of these tests
        write_json(tmp_path / f"{name}.json", read_json(Path(table(tmp_path, name))) | {"name": name})
    small = {name: str(tmp_path / f"{name}.json") for name in ("voco-b", "swinunetr-ssl")}
    monkeypatch.setattr("nnssl_plugin.checkpoints.adaptation.fitting_tables.shipped_mappings", lambda: list(small))
    original = fitting_tables.with_table
    monkeypatch.setattr(fitting_tables, "with_table", lambda source, name: original(source, small[name]))
    assert fitting_tables.fitting_tables(read_source(tmp_path / "a.pt")) == ["voco-b"]
    write_edited_plan("901", "second", presets=["swinunetr-b"], assignments=SMALL)
    write_edited_plan("901", "first", source="second", assignments=[f"{UNDER}.architecture.arch_kwargs.use_v2=false"])
    given = ["-w", str(tmp_path / "a.pt"), "--mapping", small["swinunetr-ssl"]]
    assert main(["adapt", "-d", "901", "-p", "first", "-n", "x", *given]) == 2
    said = capsys.readouterr().err
    assert "of the checkpoint's encoder has a place in this network" in said
    assert "the network of the table voco-b: --mapping voco-b" in said and "plan -d 901 -p first --like" in said


def test_its_checkpoint_says_which_network_it_is(tmp_path):
    weights = network_of(channels=3).state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    source = read_source(tmp_path / "bare.pt", mapping=table(tmp_path))
    assert (source.key_to_encoder, source.key_to_stem) == ("swinViT", "swinViT.patch_embed")
    assert source.weights.keys() == weights.keys()


def test_the_memory_of_a_step_counts_its_windows():
    plans = [with_swin(fake_plan(), window_size=window) for window in (3, 7)]
    small, large = (training_bytes(plan, "3d_fullres", dataset_json()) for plan in plans)
    assert 0 < small < large  # attention within a window keeps the matrix of all pairs of its tokens


def test_groups_of_fine_tuning_hold_every_parameter_once():
    network = network_of()
    groups = parameter_groups(network, layer_decay=0.5, frozen_until=3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    assert [group["name"] for group in groups] == ["decoder", *(f"encoder stage {n}" for n in range(4))]
    encoder = {id(p) for p in network.swinViT.parameters()}
    assert {id(p) for group in groups[1:] for p in group["params"]} == encoder
    first = {id(p) for p in groups[1]["params"]}
    parts = (network.swinViT.patch_embed, network.swinViT.layers1c, network.swinViT.layers1)
    assert first == {id(p) for part in parts for p in part.parameters()}


@pytest.mark.parametrize("use_v2", [True, False])
def test_a_linear_probe_moves_the_last_layer_alone(use_v2):
    network = network_of(with_swin(fake_plan(), use_v2=use_v2))
    assert len(parts_of(network).stages) == 4
    freeze_the_rest(network, parameter_groups(network, trains="head"))
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        "out.conv.conv.weight",
        "out.conv.conv.bias",
    }
    assert optimisation_for(network, None).build is torch.optim.AdamW
    assert optimisation_for(network, "sgd").build is torch.optim.SGD
