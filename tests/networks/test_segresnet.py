"""SegResNetDS: MONAI's network as a plan names it, and reading its features, decoder and trained parts."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
from fake_dataset import fake_plan
from monai.networks.nets.segresnet_ds import SegResNetDS as MonaiSegResNetDS
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from pretraining_harness import make_trainer
from small_segresnet import ARGUMENTS, CLASS, with_segresnet
from torch import nn

from nnssl_plugin.checkpoints.adaptation.adapt import HEAD, adapt_weights
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import OPTIMISATIONS, optimisation_for, parameter_groups
from nnssl_plugin.methods.mae.trainer import MAEPretrainer
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer
from nnssl_plugin.methods.s2dc.trainer import S2DCPretrainer
from nnssl_plugin.networks import segresnet
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.family import family_of_class, family_of_keys, parts_of
from nnssl_plugin.networks.segresnet import SegResNetDS
from nnssl_plugin.nnunet.plan_edits import patch_divisors
from nnssl_plugin.nnunet.plans import build_network, takes_deep_supervision

WIDTHS = (4, 8, 16, 32)
DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}}


def build(channels=1, **arguments):
    torch.manual_seed(0)
    return Backbone(SegResNetDS(channels, 3, **ARGUMENTS | arguments), channels)


def image(channels=1, size=(16, 24, 16), batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_keys_and_output_are_those_of_monais_own_network():
    ours = build(channels=4).network.eval()
    theirs = MonaiSegResNetDS(in_channels=4, out_channels=3, **ARGUMENTS).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = image(4)
    assert torch.equal(ours(x), theirs(x))


def test_the_preset_is_ct_fms_network_with_instance_normalisation(repository):
    architecture = json.loads((repository / "plans" / "segresnet.json").read_text())["architecture"]
    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"], architecture["arch_kwargs"], [], 1, 2, deep_supervision=False
        )
    encoder = sum(p.numel() for p in network.encoder.parameters())
    assert encoder // 10**6 == 77  # "77M params", the readme of project-lighter/CT-FM
    assert any(isinstance(module, nn.InstanceNorm3d) and module.affine for module in network.modules())
    sizes = [f.shape[1:3] for f in Backbone(network, 1).features(torch.empty(1, 1, 32, 32, 32, device="meta"))]
    assert sizes == [(32, 32), (64, 16), (128, 8), (256, 4), (512, 2)]


@pytest.mark.parametrize(
    ("channels", "arguments", "size"),
    [(1, {}, (16, 24, 16)), (4, {"norm": "instance"}, (16, 16, 32)), (2, {"spatial_dims": 2}, (16, 40))],
)
@torch.no_grad()
def test_decode_then_segment_is_the_networks_own_forward(channels, arguments, size):
    backbone = build(channels, **arguments).eval()
    x = image(channels, size)
    features = backbone.features(x)
    assert (backbone.channels, backbone.dimensions) == (WIDTHS, len(size))
    assert backbone.strides == tuple((s,) * len(size) for s in (1, 2, 4, 8))
    assert [tuple(f.shape) for f in features] == [
        (2, width, *(n // 2**stage for n in size)) for stage, width in enumerate(WIDTHS)
    ]
    decoded = backbone.decode(features)
    torch.testing.assert_close(backbone.network.up_layers[-1]["head"](decoded), backbone.network(x))
    assert backbone.reconstruct(features).shape == x.shape


@torch.no_grad()
def test_without_skips_only_the_bottleneck_counts_and_features_stay_as_they_were():
    backbone = build().eval()
    features = backbone.features(image())
    kept = [f.clone() for f in features]
    without = backbone.decode(features, skips=False)
    assert not torch.allclose(without, backbone.decode(features))
    spoiled = [torch.randn_like(f) for f in features[:-1]] + features[-1:]
    assert torch.equal(backbone.decode(spoiled, skips=False), without)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, kept, strict=True))


@pytest.mark.parametrize("skips", [True, False])
def test_reconstruction_gives_everything_trained_a_gradient(skips):
    backbone = build()
    backbone.train_only(("encoder", "decoder"))
    backbone.reconstruct(backbone.features(image()), skips=skips).square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("parts", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_trained_prefixes_name_exactly_the_trained_keys(parts):
    backbone = build()
    backbone.train_only(parts)
    prefixes = tuple(backbone.trained_prefixes())
    for name, parameter in backbone.network.named_parameters():
        assert parameter.requires_grad == name.startswith(prefixes), name
    assert not any(p.requires_grad for p in backbone.network.up_layers[-1]["head"].parameters())


def test_large_parts_cover_the_network_once_and_a_copy_reads_its_own():
    backbone = build()
    compiled = [id(p) for module in backbone._reader.compiled() for p in module.parameters()]
    head = {id(p) for p in backbone.network.up_layers[-1]["head"].parameters()}
    assert sorted(compiled) == sorted(id(p) for p in backbone.network.parameters() if id(p) not in head)
    teacher = copy.deepcopy(backbone).eval()
    before = teacher.features(image())[-1]
    nn.init.zeros_(backbone.network.encoder.conv_init.weight)
    assert torch.equal(teacher.features(image())[-1], before)


def test_the_names_of_its_parts_lead_to_them():
    network = build(channels=4).network
    assert network.get_submodule(network.key_to_encoder) is network.encoder.layers
    assert network.get_submodule(network.key_to_stem) is network.encoder.conv_init
    readers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv3d) and n.startswith("encoder.conv")]
    assert tuple(readers) == network.keys_to_in_proj
    assert family_of_keys(network.state_dict()) is family_of_class(CLASS)


def test_the_fine_tuning_recipe_reaches_every_stage():
    network = build().network
    parts = parts_of(network)
    groups = parameter_groups(network, layer_decay=0.5)
    assert [group["name"] for group in groups] == ["decoder", *(f"encoder stage {n}" for n in range(4))]
    assert [group["lr_scale"] for group in groups] == [1.0, 0.0625, 0.125, 0.25, 0.5]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in network.parameters())
    assert parts.head == list(network.up_layers[-1]["head"].parameters())
    assert optimisation_for(network, None) is OPTIMISATIONS["adamw"]


def test_one_channel_becomes_three_with_running_statistics_and_other_classes():
    source = build().network.double()
    source.train()(image().double())
    target = SegResNetDS(3, 5, **ARGUMENTS).double()
    state, report = adapt_weights(source.state_dict(), target, trained=None)
    target.load_state_dict(state)
    assert [report.coverage(part) for part in ("encoder", "decoder", "head")] == [1.0, 1.0, 0.0]
    assert {record.reason for record in report.tensors if record.reason} == {"input channels 1 → 3", HEAD}
    assert torch.equal(
        target.encoder.layers[0]["blocks"][0].norm1.running_var, source.encoder.layers[0]["blocks"][0].norm1.running_var
    )
    x = image().double()
    for ours, theirs in zip(target.eval().encoder(x.expand(-1, 3, -1, -1, -1)), source.eval().encoder(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"blocks_down": [1, 1, 1]},
        {"blocks_down": [1, 2, 2, 4, 4], "resolution": [3.0, 1.0, 1.0]},
        {"blocks_down": [1, 1, 1], "resolution": [8.0, 1.0, 2.0]},
        {"blocks_down": [1, 1, 1, 1, 1], "resolution": [1.0, 5.0, 0.7]},
    ],
)
def test_divisors_are_monais(arguments):
    with torch.device("meta"):
        network = MonaiSegResNetDS(**{"init_filters": 4} | arguments)
    architecture = {"network_class_name": CLASS, "arch_kwargs": arguments, "_kw_requires_import": []}
    assert patch_divisors(architecture, 3) == [int(d) for d in network.shape_factor()]
    assert tuple(int(d) for d in network.shape_factor()) == Backbone(network, 1).strides[-1]


def test_tokens_are_centred_where_the_strided_convolutions_put_them():
    backbone = build()
    assert backbone.token_centres((2, 3, 2), 8).max(0).values.tolist() == [8.0, 16.0, 8.0]
    assert backbone.token_centres((2, 3, 2), 8).min().item() == 0.0


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="8x8x8 divides, which those of an image of 16x20x16"):
        build().features(image(size=(16, 20, 16)))


def test_there_is_no_deep_supervision():
    assert not takes_deep_supervision(CLASS)
    with pytest.raises(UserError, match="without deep supervision") as error:
        get_network_from_plans(CLASS, ARGUMENTS, [], 1, 2, deep_supervision=True)
    assert "PretrainedSegmentationTrainer" in error.value.remedy


def test_without_monai_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.segresnet_ds", None)
    spec = importlib.util.find_spec("nnssl_plugin.networks.segresnet")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(segresnet, "SegResNetDS", module.SegResNetDS)
    with pytest.raises(UserError, match="MONAI") as error:
        build_network(with_segresnet(fake_plan()), "3d_fullres", DATASET_JSON, device="meta")
    assert error.value.remedy == 'pip install "nnssl_plugin[monai]"'


METHODS = {
    MAEPretrainer: {"block": 4},
    Med3DInsightPretrainer: {"queries": 4, "dim": 16, "heads": 2, "layers": 1, "mask_block": 4, "slice_bins": 8},
    S2DCPretrainer: {"hidden": 16, "dim": 8, "queue": 6, "token_stride": 4, "momentum": 0.9},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_pretrains_it(method, nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for drawing in ("draw_pictures", "draw_progress"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{drawing}", lambda *arguments, **options: None)
    steps = {"epochs": 1, "iterations_per_epoch": 1, "validation_iterations": 1, "batch_size": 2, "warmup_epochs": 0}
    planned = make_trainer(trainer_class=method, pretraining=steps | {"method": METHODS[method]})
    plan = with_segresnet(planned.plans_manager.plans, norm="instance") | {"continue_training": False}
    trainer = method(plan, "3d_fullres", "all", planned.dataset_json, torch.device("cpu"))
    trainer.initialize()
    before = {name: p.clone() for name, p in trainer.task.backbone.network.named_parameters()}
    trainer.run_training()
    after = dict(trainer.task.backbone.network.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    encoder = {name for name, p in before.items() if name.startswith("encoder.") and p.dim() > 1}
    assert encoder <= moved and not any(".head." in name for name in moved)
    assert trainer.log.history()["skipped_steps"] == [0.0]
