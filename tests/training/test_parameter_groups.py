"""Rates by the stages of the encoder: each parameter once, with the factor of its stage times that of its group."""

import pytest
import torch
from fake_dataset import fake_plan
from small_primus import with_primus
from toy_method import Settings, Toy

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.training.parameter_groups import scaled_by_stage, stage_scales

LABELS = {"channel_names": {"0": "MR", "1": "MR"}, "labels": {"background": 0, "body": 1}}


def toy(kind):
    plan = with_primus(fake_plan()) if kind == "primus" else fake_plan(residual=kind == "residual")
    return Toy(Backbone(build_network(plan, "3d_fullres", LABELS), 2), Settings())


def test_scales_fall_by_the_factor_from_the_deepest_stage_on():
    assert stage_scales(3, 0.5) == [0.125, 0.25, 0.5]
    assert stage_scales(2, 1.0) == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["plain", "residual", "primus"])
def test_every_parameter_is_in_one_group_at_the_rate_of_its_stage(kind):
    task = toy(kind)
    parts = task.backbone.parts()
    groups = scaled_by_stage(task.parameter_groups(), parts, 0.5)
    scale_of = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert len(scale_of) == sum(len(group["params"]) for group in groups)
    assert scale_of.keys() == {id(p) for p in task.parameters() if p.requires_grad}
    for depth, stage in enumerate(reversed(parts.stages), start=1):
        assert {scale_of[id(p)] for p in stage if p.requires_grad} == {0.5**depth}
    assert {scale_of[id(p)] for p in task.head.parameters()} == {1.0}
    assert scale_of[id(task.scale)] == 0.1 and groups[-1]["clip"] is False
    assert groups[0]["lr_scale"] == 1.0  # the rate that is logged


def test_a_groups_own_factor_is_multiplied_and_1_leaves_the_groups_as_they_are():
    task = toy("plain")
    parts = task.backbone.parts()
    of_stage = [{"params": parts.stages[0], "lr_scale": 0.2, "weight_decay": 0.0}]
    (group,) = scaled_by_stage(of_stage, parts, 0.5)
    assert group["lr_scale"] == pytest.approx(0.2 * 0.5 ** len(parts.stages)) and group["weight_decay"] == 0.0
    assert scaled_by_stage(of_stage, parts, 1.0) == of_stage
    assert torch.is_tensor(of_stage[0]["params"][0])
