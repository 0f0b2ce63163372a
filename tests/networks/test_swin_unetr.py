"""SwinUNETR: MONAI's network as a plan names it, and reading its features, decoder and trained parts."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
from fake_dataset import fake_plan
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from small_swin import ARGUMENTS, PATCH, with_swin
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks import swin_unetr
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.swin_unetr import SwinUNETR
from nnssl_plugin.nnunet.plans import build_network, takes_deep_supervision

CLASS = "nnssl_plugin.networks.swin_unetr.SwinUNETR"
WIDTHS = (12, 24, 48, 96, 192)
SKIPS = ["encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10."]
UPSAMPLING = ["decoder1.", "decoder2.", "decoder3.", "decoder4.", "decoder5."]
DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


def build(channels=1, **arguments):
    torch.manual_seed(0)
    return Backbone(SwinUNETR(channels, 3, **ARGUMENTS | arguments), channels)


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 1, *PATCH, generator=torch.Generator().manual_seed(1))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_preset_is_the_network_of_the_papers(repository):
    architecture = json.loads((repository / "plans" / "swinunetr-b.json").read_text())["architecture"]
    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            1,
            14,
            deep_supervision=False,
        )
    assert round(count(network) / 1e6, 2) == 72.76 and round(count(network.swinViT) / 1e6, 2) == 18.64
    backbone = Backbone(network, 1)
    sizes = [tuple(f.shape[1:3]) for f in backbone.features(torch.empty(1, 1, 96, 96, 96, device="meta"))]
    assert sizes == [(1, 96), (48, 48), (96, 24), (192, 12), (384, 6), (768, 3)]


@torch.no_grad()
def test_keys_and_output_are_those_of_monais_own_network():
    ours = build(channels=4).network.eval()
    theirs = MonaiSwinUNETR(in_channels=4, out_channels=3, **ARGUMENTS).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 4, *PATCH)
    assert torch.equal(ours(x), theirs(x))


def test_the_names_of_its_parts_lead_to_them():
    network = build(channels=4).network
    assert network.get_submodule(network.key_to_encoder) is network.swinViT
    assert network.get_submodule(network.key_to_stem) is network.swinViT.patch_embed
    readers = {
        name for name, module in network.named_modules() if isinstance(module, nn.Conv3d) and module.in_channels == 4
    }
    assert {name.removesuffix(".conv") for name in readers} == {
        name.removesuffix(".conv") for name in network.keys_to_in_proj
    }


@pytest.mark.parametrize("channels", [1, 4])
def test_shapes_of_features_tokens_and_reconstruction(channels):
    backbone = build(channels)
    assert (backbone.channels, backbone.dimensions) == ((channels, *WIDTHS), 3)
    assert backbone.strides == tuple((s,) * 3 for s in (1, 2, 4, 8, 16, 32))
    x = torch.randn(2, channels, *PATCH)
    features = backbone.features(x)
    assert [tuple(f.shape) for f in features] == [
        (2, width, *(size // 2**stage for size in PATCH)) for stage, width in enumerate((channels, *WIDTHS))
    ]
    assert features[0] is x
    tokens, grid = backbone.tokens(features, stride=16)
    assert grid == (4, 2, 2) and tokens.shape == (2, 16, 96)
    assert torch.equal(tokens[:, 1 * 4 + 1 * 2 + 0], features[4][:, :, 1, 1, 0])
    assert backbone.pooled(features).shape == (2, 192)
    assert backbone.reconstruct(features).shape == (2, channels, *PATCH)


@pytest.mark.slow
@pytest.mark.parametrize("use_v2", [True, False])
def test_decode_then_segment_is_the_networks_own_forward(image, use_v2):
    backbone = build(use_v2=use_v2).eval()
    decoded = backbone.decode(backbone.features(image))
    torch.testing.assert_close(backbone.network.out(decoded), backbone.network(image))


def test_two_dimensions():
    backbone = build(channels=2, spatial_dims=2).eval()
    x = torch.randn(2, 2, 64, 96)
    features = backbone.features(x)
    assert backbone.dimensions == 2 and tuple(features[-1].shape) == (2, 192, 2, 3)
    torch.testing.assert_close(backbone.network.out(backbone.decode(features)), backbone.network(x))
    assert backbone.reconstruct(features).shape == (2, 2, 64, 96)


@pytest.mark.slow
@torch.no_grad()
def test_without_skips_only_the_bottleneck_counts(image):
    backbone = build()
    features = backbone.features(image)
    spoiled = [torch.randn_like(f) for f in features[:-1]] + features[-1:]
    without = backbone.decode(features, skips=False)
    assert without.shape == (1, 12, *PATCH)
    assert torch.equal(backbone.decode(spoiled, skips=False), without)
    other = [*features[:-1], torch.randn_like(features[-1])]
    assert not torch.allclose(backbone.decode(other, skips=False), without)


def test_the_coarsest_map_reaches_the_whole_encoder(image):
    backbone = build()
    backbone.train_only(("encoder",))
    deepest = backbone.features(image)[-1]
    (deepest * torch.randn_like(deepest)).sum().backward()
    assert [name for name, p in backbone.network.swinViT.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for name, p in backbone.network.named_parameters() if not name.startswith("swinViT."))


@pytest.mark.slow
@pytest.mark.parametrize("skips", [True, False])
def test_reconstruction_gives_everything_trained_a_gradient(image, skips):
    backbone = build()
    backbone.train_only(("encoder", "decoder"))
    backbone.reconstruct(backbone.features(image), skips=skips).square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)
    assert bool(backbone.network.encoder1.layer.conv1.conv.weight.grad.any()) == skips


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (("encoder", "decoder"), ["swinViT.", *SKIPS, *UPSAMPLING]),
        (("encoder",), ["swinViT."]),
        (("decoder",), [*SKIPS, *UPSAMPLING]),
        ((), []),
    ],
)
def test_trained_prefixes_name_exactly_the_trained_keys(parts, prefixes):
    backbone = build()
    backbone.train_only(parts)
    assert backbone.trained_prefixes() == prefixes
    for name, parameter in backbone.network.named_parameters():
        assert parameter.requires_grad == name.startswith(tuple(prefixes)), name
    assert backbone.reconstruction_head.weight.requires_grad == ("decoder" in parts)


def test_a_copy_reads_its_own_network(image):
    backbone = build().eval()
    teacher = copy.deepcopy(backbone)
    before = teacher.features(image)[-1]
    nn.init.zeros_(backbone.network.swinViT.patch_embed.proj.weight)
    assert torch.equal(teacher.features(image)[-1], before)
    assert not torch.equal(backbone.features(image)[-1], before)


def test_large_parts_cover_the_network_once():
    backbone = build()
    compiled = [id(p) for module in backbone._reader.compiled() for p in module.parameters()]
    head = {id(p) for p in backbone.network.out.parameters()}
    assert sorted(compiled) == sorted(id(p) for p in backbone.network.parameters() if id(p) not in head)


def test_an_image_that_cannot_be_halved_five_times_is_refused():
    with pytest.raises(UserError, match="64x40x32 voxels") as error:
        build().features(torch.randn(1, 1, 64, 40, 32))
    assert "multiple of 32" in error.value.remedy


def test_there_is_no_deep_supervision(image):
    assert not takes_deep_supervision(CLASS)
    build_with = [CLASS, ARGUMENTS, [], 1, 2]
    network = get_network_from_plans(*build_with, deep_supervision=False)  # as nnU-Net predicts
    assert network(image).shape == (1, 2, *PATCH)
    with pytest.raises(UserError, match="without deep supervision") as error:
        get_network_from_plans(*build_with, deep_supervision=True)
    assert "PretrainedSegmentationTrainer" in error.value.remedy


def test_rates_of_stochastic_depth_are_the_same_without_memory():
    rates = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            network = SwinUNETR(1, 2, **ARGUMENTS, dropout_path_rate=0.2)
        rates.append([m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"])
        assert {p.device.type for p in network.parameters()} == {device}
    assert rates[0] == rates[1] == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_without_monai_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.swin_unetr", None)
    spec = importlib.util.find_spec("nnssl_plugin.networks.swin_unetr")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match="MONAI") as error:
        module.SwinUNETR(1, 2, **ARGUMENTS)
    assert error.value.remedy == 'pip install "nnssl_plugin[swin]"'
    monkeypatch.setattr(swin_unetr, "SwinUNETR", module.SwinUNETR)
    with pytest.raises(UserError, match="MONAI"):
        build_network(with_swin(fake_plan()), "3d_fullres", DATASET_JSON, device="meta")


def test_an_argument_that_does_not_fit_is_explained():
    with pytest.raises(UserError, match="feature_size should be divisible by 12"):
        build_network(with_swin(fake_plan(), feature_size=10), "3d_fullres", DATASET_JSON, device="meta")
