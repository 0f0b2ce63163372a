"""A family of networks serves everything: a network that only this test knows, and those of the package."""

import sys
import types
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from fake_dataset import fake_plan
from small_primus import with_primus
from torch import nn

from nnssl_plugin.checkpoints.adaptation.adapt import adapt_weights
from nnssl_plugin.checkpoints.format.provenance import nnssl_adaptation_plan
from nnssl_plugin.checkpoints.sources.layouts import Keys, keys_of_network
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import OPTIMISATIONS, optimisation_for, parameter_groups
from nnssl_plugin.networks import family as families
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.family import (
    Family,
    Parts,
    all_families,
    family_of,
    family_of_class,
    family_of_keys,
    parts_of,
    register,
)
from nnssl_plugin.nnunet.plan_edits import check_plan, patch_divisors
from nnssl_plugin.nnunet.plans import build_network, takes_deep_supervision

DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


class Toy(nn.Module):
    """Three convolutions down by their kernels, three up, without skips."""

    def __init__(self, input_channels, num_classes, width=4):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv3d(input_channels, width, 3, padding=1), nn.Conv3d(width, 2 * width, 2, 2)])
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.classes = nn.Conv3d(width, num_classes, 1)

    def forward(self, x):
        for layer in self.down:
            x = layer(x).relu()
        return self.classes(self.up(x))


class ToyReader:
    dimensions = 3
    strides = ((1, 1, 1), (2, 2, 2))
    offsets = ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    prefixes = ("down.", "up.")
    encoder_prefixes = ("down.",)
    head_prefixes = ("classes.",)
    planned_grid = None

    def __init__(self, network):
        self.network = network
        self.channels = tuple(layer.out_channels for layer in network.down)

    def features(self, x):
        fine = self.network.down[0](x).relu()
        return [fine, self.network.down[1](fine).relu()]

    def decode(self, features, skips):
        return self.network.up(features[-1])

    def image_layer(self, input_channels):
        return nn.Conv3d(self.channels[0], input_channels, 1)

    def encoder_parameters(self):
        return self.network.down.parameters()

    def decoder_parameters(self):
        return self.network.up.parameters()

    def parts(self):
        stages = [list(layer.parameters()) for layer in self.network.down]
        return Parts(stages, "level", list(self.network.classes.parameters()))

    def compiled(self):
        return [self.network.down, self.network.up]


TOY = Family(
    name="Toy",
    classes="Toy",
    marker="down.0.weight",
    recognises=lambda network: hasattr(network, "down") and hasattr(network, "classes"),
    reader=ToyReader,
    encoder="down",
    stem="down.0",
    image_layers=("down.0",),
    available="this test",
    divisors=lambda arguments, dimensions: [2] * dimensions,
    optimiser="adamw",
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(families, "_REGISTERED", [])
    register(TOY)
    module = types.ModuleType("toy_networks")
    module.Toy = Toy
    monkeypatch.setitem(sys.modules, "toy_networks", module)
    torch.manual_seed(0)
    return Toy(1, 2)


def toy_plan(patch=(16, 16, 16), **arguments):
    plan = fake_plan()
    plan["configurations"]["3d_fullres"] |= {
        "patch_size": list(patch),
        "architecture": {
            "network_class_name": "toy_networks.Toy",
            "arch_kwargs": arguments,
            "_kw_requires_import": [],
        },
    }
    return plan


def test_backbones_read_it(toy):
    backbone = Backbone(toy, 1)
    image = torch.randn(2, 1, 8, 6, 4)
    features = backbone.features(image)
    tokens, counts = backbone.tokens(features, stride=2)
    assert counts == (4, 3, 2) and tokens.shape == (2, 24, 8)
    assert backbone.token_centres(counts, 2)[-1].tolist() == [6.5, 4.5, 2.5]
    assert backbone.reconstruct(features).shape == image.shape
    torch.testing.assert_close(toy.classes(backbone.decode(features)), toy(image))
    backbone.train_only(("encoder",))
    assert backbone.trained_prefixes() == ["down."]


def test_weights_are_adapted_to_it(toy):
    target = Toy(2, 3, width=4)
    state, report = adapt_weights(toy.state_dict(), target, trained=None)
    assert report.coverage("encoder") == 1 and report.coverage("decoder") == 1 and report.coverage("head") == 0
    torch.testing.assert_close(state["down.0.weight"].sum(1), toy.down[0].weight.sum(1))
    assert torch.equal(state["classes.weight"], target.classes.weight)
    other = build_network(fake_plan(), "3d_fullres", DATASET_JSON)
    reasons = {record.reason for record in adapt_weights(toy.state_dict(), other, trained=None)[1].initialised()}
    assert "the checkpoint holds a Toy, this network is a PlainConvUNet" in reasons


def test_recipes_of_fine_tuning_know_its_parts(toy):
    groups = parameter_groups(toy, layer_decay=0.5)
    assert [(group["name"], group["lr_scale"]) for group in groups] == [
        ("decoder", 1),
        ("level 0", 0.25),
        ("level 1", 0.5),
    ]
    (head,) = parameter_groups(toy, trains="head")
    assert {id(p) for p in head["params"]} == {id(p) for p in toy.classes.parameters()}
    assert optimisation_for(toy, None) is OPTIMISATIONS["adamw"]


def test_plans_are_built_and_checked_with_it(toy):
    plan = toy_plan(width=6)
    assert not takes_deep_supervision("toy_networks.Toy")
    assert isinstance(build_network(plan, "3d_fullres", DATASET_JSON), Toy)
    assert patch_divisors(plan["configurations"]["3d_fullres"]["architecture"], 3) == [2, 2, 2]
    check_plan(plan, fake_plan(), DATASET_JSON)
    with pytest.raises(UserError, match="not divisible by the network's strides"):
        check_plan(toy_plan((16, 16, 15)), fake_plan(), DATASET_JSON)


def test_checkpoints_say_where_its_parts_are(toy):
    assert keys_of_network({"class": "toy_networks.Toy", "kwargs": {}}) == Keys("down", "down.0", None)
    block = nnssl_adaptation_plan(toy_plan(), "3d_fullres", toy, 1)
    assert (block["key_to_encoder"], block["key_to_stem"], block["keys_to_in_proj"]) == ("down", "down.0", ["down.0"])


@pytest.mark.parametrize(
    "plan", [fake_plan(), fake_plan(residual=True), fake_plan(dimensions=2), with_primus(fake_plan())]
)
def test_module_class_and_keys_tell_the_same_family(plan):
    (configuration,) = plan["configurations"]
    network = build_network(deepcopy(plan), configuration, DATASET_JSON)
    name = plan["configurations"][configuration]["architecture"]["network_class_name"]
    assert family_of(network) is family_of_class(name) is family_of_keys(network.state_dict())
    family, keys = family_of(network), set(network.state_dict())
    for place in (family.encoder, family.stem, *family.image_layers):
        assert any(key.startswith(f"{place}.") for key in keys), place
    assert takes_deep_supervision(name) == (family.optimiser == "sgd")


def test_markers_and_classes_are_of_one_family_each():
    for family in all_families():
        assert family_of_keys([f"{family.marker}weight"]) is family
    assert [family_of_class(f"x.{name}").name for name in ("PrimusM", "PrimusV2S", "PrimusX")] == [
        "Primus",
        "Primus with a convolutional stem",
        "Primus",
    ]
    assert family_of_class("torch.nn.Linear") is family_of_keys(["weight"]) is family_of(nn.Linear(1, 1)) is None
    assert parts_of(nn.Linear(1, 1)) is None


class SummaryToyReader(ToyReader):
    """Its summary is the mean of the deepest map, standing in for a token."""

    has_summary = True

    def summarised(self, x):
        features = self.features(x)
        return features[-1].flatten(2).mean(2), features


def test_a_summary_comes_with_the_features(toy, monkeypatch):
    monkeypatch.setattr(families, "_REGISTERED", [replace(TOY, reader=SummaryToyReader)])
    backbone, image = Backbone(toy, 1), torch.randn(2, 1, 8, 6, 4)
    summary, features = backbone.summarised(image)
    assert backbone.has_summary and summary.shape == (2, 8)
    torch.testing.assert_close(features, backbone.features(image))
    monkeypatch.setattr(SummaryToyReader, "has_summary", False)  # the same network planned without the token
    assert not backbone.has_summary
    with pytest.raises(UserError, match="Toy has no summary token"):
        backbone.summarised(image)


@pytest.mark.parametrize("kind", ["toy", "PlainConvUNet", "Primus"])
def test_networks_without_a_summary_say_so(toy, kind):
    plan = with_primus(fake_plan()) if kind == "Primus" else fake_plan()
    backbone = Backbone(toy if kind == "toy" else build_network(plan, "3d_fullres", DATASET_JSON), 1)
    assert not backbone.has_summary
    with pytest.raises(UserError, match="no summary token") as error:
        backbone.summarised(torch.zeros(1, 1, 16, 16, 16))
    assert "Backbone.pooled" in error.value.remedy
