"""ResNetUNet and SAMUNet: torchvision's and timm's encoders in a plan, and reading features, decoder and parts."""

import json

import pytest
import timm
import torch
import torchvision
from fake_dataset import fake_plan
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from small_planar import NETWORKS, with_planar
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import OPTIMISATIONS, optimisation_for, parameter_groups
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.family import family_of, family_of_class, family_of_keys, parts_of
from nnssl_plugin.networks.resnet_unet import ResNetUNet
from nnssl_plugin.networks.sam_unet import SAMUNet
from nnssl_plugin.nnunet.plan_edits import patch_divisors
from nnssl_plugin.nnunet.plans import build_network

CLASSES = {"ResNetUNet": ResNetUNet, "SAMUNet": SAMUNet}
DATASET_JSON = {"channel_names": {"0": "US"}, "labels": {"background": 0, "body": 1}}
EXPECTED = {
    "ResNetUNet": ((64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)),
    "SAMUNet": ((32,), (16,)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name, channels=1, **arguments):
    torch.manual_seed(0)
    return Backbone(CLASSES[name](channels, 3, **NETWORKS[name][1] | arguments), channels)


def image(channels=1, size=(64, 96)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@every_network
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_decode_then_segment_is_the_networks_own_forward(name, channels):
    backbone = build(name, channels).eval()
    x = image(channels)
    features = backbone.features(x)
    widths, strides = EXPECTED[name]
    assert backbone.channels == (channels, *widths) and backbone.dimensions == 2
    assert backbone.strides == tuple((stride, stride) for stride in (1, *strides))
    for maps, width, stride in zip(features, backbone.channels, (1, *strides), strict=True):
        assert tuple(maps.shape) == (2, width, 64 // stride, 96 // stride)
    decoded = backbone.decode(features)
    torch.testing.assert_close(backbone.network.head(decoded), backbone.network(x))
    assert backbone.network(x).shape == (2, 3, 64, 96)
    assert backbone.reconstruct(features).shape == x.shape
    without = backbone.decode(features, skips=False)
    spoiled = [torch.randn_like(f) for f in features[:-1]] + features[-1:]
    assert torch.equal(backbone.decode(spoiled, skips=False), without)
    assert not torch.allclose(without, decoded)


@every_network
@pytest.mark.parametrize("skips", [True, False])
def test_reconstruction_gives_everything_trained_a_gradient(name, skips):
    backbone = build(name)
    backbone.train_only(("encoder", "decoder"))
    backbone.reconstruct(backbone.features(image()), skips=skips).square().mean().backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@every_network
@pytest.mark.parametrize("parts", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_trained_prefixes_name_exactly_the_trained_keys(name, parts):
    backbone = build(name)
    backbone.train_only(parts)
    prefixes = tuple(backbone.trained_prefixes())
    for key, parameter in backbone.network.named_parameters():
        assert parameter.requires_grad == key.startswith(prefixes), key


@every_network
def test_its_family_is_found_by_network_class_and_keys(name):
    network = build(name).network
    family = family_of(network)
    assert family.name == name and family is family_of_class(name) and family is family_of_keys(network.state_dict())
    assert isinstance(network.get_submodule(network.key_to_stem), nn.Module)
    readers = [
        key
        for key, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 1 and "head" not in key
    ]
    assert tuple(readers) == network.keys_to_in_proj


@every_network
def test_the_fine_tuning_recipe_reaches_every_stage(name):
    network = build(name).network
    groups = parameter_groups(network, layer_decay=0.5)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in network.parameters())
    assert len(groups) == {"ResNetUNet": 6, "SAMUNet": 4}[name]
    assert parts_of(network).head == list(network.head.parameters())
    assert optimisation_for(network, None) is OPTIMISATIONS["adamw"]


@every_network
def test_a_plan_builds_it_and_says_what_its_patch_must_be(name):
    plan = with_planar(fake_plan(dimensions=2), name)
    network = build_network(plan, "2d", DATASET_JSON)
    assert network(image()).shape == (2, 2, 64, 96)
    architecture = plan["configurations"]["2d"]["architecture"]
    assert patch_divisors(architecture, 2) == [{"ResNetUNet": 32, "SAMUNet": 16}[name]] * 2
    with pytest.raises(UserError, match="deep supervision"):
        CLASSES[name](1, 2, deep_supervision=True, **NETWORKS[name][1])


def test_wrong_numbers_of_stages_are_told():
    with pytest.raises(UserError, match="four stages and five decoder levels"):
        ResNetUNet(1, 2, blocks=[1, 1], decoder_features=[8, 8])


def preset(repository, name, channels=3):
    architecture = json.loads((repository / "plans" / f"{name}.json").read_text())["architecture_2d"]
    return get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], [], channels, 2, deep_supervision=False
    )


def test_the_preset_is_torchvisions_resnet_50(repository):
    with torch.device("meta"):
        ours, theirs = preset(repository, "resnet50-unet").encoder, torchvision.models.resnet50(weights=None)
    of_fc = {"fc.weight", "fc.bias"}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items() if k not in of_fc
    }
    assert sum(p.numel() for p in theirs.parameters()) == 25_557_032


@torch.no_grad()
def test_the_encoder_gives_the_maps_of_torchvisions_own():
    encoder = build("ResNetUNet", 3).network.encoder.eval()
    theirs = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=4)
    theirs.load_state_dict(encoder.state_dict() | {"fc.weight": theirs.fc.weight, "fc.bias": theirs.fc.bias})
    expected = theirs.eval()(image(3))
    torch.testing.assert_close(theirs.fc(encoder(image(3))[-1].mean((2, 3))), expected)


def test_the_preset_is_sams_vit_b(repository):
    with torch.device("meta"):
        ours = preset(repository, "samvit-b-unet").vit
        theirs = timm.create_model("samvit_base_patch16", num_classes=0)
    without_neck = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("neck.")}
    assert {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("neck.")} == without_neck
    assert sum(p.numel() for p in theirs.parameters()) == 89_670_912


@torch.no_grad()
def test_the_encoder_gives_the_map_of_timms_own_at_any_size():
    encoder = build("SAMUNet", 3, neck_chans=8).network.vit.eval()
    options = {k: v for k, v in NETWORKS["SAMUNet"][1].items() if k != "decoder_width"}
    theirs = timm.models.vision_transformer_sam.VisionTransformerSAM(
        in_chans=3, num_classes=0, use_rel_pos=True, neck_chans=8, **options
    )
    theirs.load_state_dict(encoder.state_dict())
    for size in ((64, 64), (32, 80)):
        torch.testing.assert_close(encoder(image(3, size)), theirs.eval().forward_features(image(3, size)))
