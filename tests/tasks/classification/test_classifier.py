"""The classifier: its shapes, what it pools, its attention over windows, and which parameters may move."""

import pytest
import torch
from fake_dataset import fake_plan
from small_primus import with_primus

from nnssl_plugin.finetuning.parameter_groups import freeze_the_rest, parameter_groups, rest_at_test_mode
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.classification.classifier import AttentionPooling, Classifier

HEADS = {"diagnosis": 3, "a sign/with.odd name": 1}


def network_of(dimensions=3, channels=1, residual=False):
    dataset_json = {"channel_names": {str(c): "MR" for c in range(channels)}, "labels": {"background": 0, "body": 1}}
    configuration = "2d" if dimensions == 2 else "3d_fullres"
    return build_network(fake_plan(dimensions=dimensions, residual=residual), configuration, dataset_json)


def classifier(*, channels=1, stages=1, dropout=0.0, **network):
    torch.manual_seed(0)
    return Classifier(
        network_of(channels=channels, **network), input_channels=channels, heads=HEADS, stages=stages, dropout=dropout
    )


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("batch", "windows", "channels"), [(1, 1, 1), (3, 2, 4)])
def test_each_target_has_its_logits(dimensions, batch, windows, channels):
    subject = classifier(dimensions=dimensions, channels=channels, residual=dimensions == 2)
    logits = subject(torch.randn(batch, windows, channels, *[16] * dimensions))
    assert {name: tuple(z.shape) for name, z in logits.items()} == {name: (batch, k) for name, k in HEADS.items()}
    assert all(torch.isfinite(z).all() for z in logits.values())


@pytest.mark.parametrize(("stages", "expected"), [(1, [16]), (2, [8, 16]), (9, [4, 8, 16])])
def test_stages_are_pooled_to_mean_and_maximum(stages, expected):
    subject = classifier(stages=stages).eval()
    x = torch.randn(2, 1, 1, 16, 16, 16)
    features = subject.embed(x)
    assert features.shape == (2, 2 * sum(expected))
    deepest = subject.backbone.features(x[:, 0])[-1]
    torch.testing.assert_close(features[:, -32:-16], deepest.mean((2, 3, 4)))
    torch.testing.assert_close(features[:, -16:], deepest.flatten(2).max(-1).values)


def test_the_order_of_windows_does_not_matter():
    subject = classifier().eval()
    x = torch.randn(2, 5, 1, 16, 16, 16)
    shuffled = x[:, torch.tensor([3, 1, 4, 0, 2])]
    for name, logits in subject(x).items():
        torch.testing.assert_close(subject(shuffled)[name], logits)


def test_one_window_and_equal_windows_come_out_as_they_are():
    pooling, features = AttentionPooling(6).double(), torch.randn(3, 1, 6, dtype=torch.float64)
    assert torch.equal(pooling(features), features[:, 0])
    torch.testing.assert_close(pooling(features.expand(3, 4, 6)), features[:, 0])


def test_attention_is_the_naive_sum():
    pooling, features = AttentionPooling(6, hidden=5), torch.randn(2, 3, 6)
    for sample, pooled in zip(features, pooling(features), strict=True):
        gated = [torch.tanh(pooling.pattern(h)) * torch.sigmoid(pooling.gate(h)) for h in sample]
        scores = torch.stack([pooling.score.weight[0] @ g for g in gated])
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(pooled, sum(w * h for w, h in zip(weights, sample, strict=True)))


def test_the_decoder_rests_and_everything_else_learns():
    subject = classifier()
    sum(z.square().sum() for z in subject(torch.randn(2, 3, 1, 16, 16, 16)).values()).backward()
    moving = {name for name, p in subject.named_parameters() if p.requires_grad}
    assert moving == {name for name, p in subject.named_parameters() if p.grad is not None}
    assert not any("decoder.stages" in name or "reconstruction" in name for name in moving)
    assert any(name.startswith("backbone.network.encoder") for name in moving)


def test_the_recipes_know_encoder_stages_and_head():
    subject = classifier()
    groups = parameter_groups(subject, parts=subject.parts(), layer_decay=0.5, frozen_until=2)
    assert [group["name"] for group in groups] == ["head", "encoder stage 0", "encoder stage 1", "encoder stage 2"]
    assert [group["lr_scale"] for group in groups] == [1, 0.125, 0.25, 0.5]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in subject.parameters() if p.requires_grad)
    assert {id(p) for p in subject.parts().head} == {id(p) for p in groups[0]["params"]}


def test_a_linear_probe_leaves_the_encoder_in_test_mode():
    subject = classifier().train()
    groups = parameter_groups(subject, parts=subject.parts(), trains="head")
    freeze_the_rest(subject, groups)
    rest_at_test_mode(subject)
    assert {name.split(".")[0] for name, p in subject.named_parameters() if p.requires_grad} == {"windows", "heads"}
    assert not subject.backbone.network.encoder.training and subject.dropout.training


def test_primus_serves_too():
    plan = with_primus(fake_plan())
    dataset_json = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
    network = build_network(plan, "3d_fullres", dataset_json)
    subject = Classifier(network, input_channels=1, heads=HEADS)
    x = torch.randn(2, 2, 1, *plan["configurations"]["3d_fullres"]["patch_size"])
    assert subject(x)["diagnosis"].shape == (2, 3)
    groups = parameter_groups(subject, parts=subject.parts(), layer_decay=0.9)
    listed = {id(p) for group in groups for p in group["params"]}
    assert {id(p) for p in subject.parameters() if p.requires_grad} <= listed
