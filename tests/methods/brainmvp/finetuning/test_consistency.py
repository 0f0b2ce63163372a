"""The loss of a pair of copies beside the paper's equations, on networks of every family."""

import pytest
import torch
from fake_dataset import fake_plan
from small_primus import with_primus
from small_segresnet import with_segresnet
from small_swin import with_swin
from torch.nn import functional

from nnssl_plugin.methods.brainmvp.finetuning.consistency import PairLoss, half
from nnssl_plugin.networks.family import reader_of
from nnssl_plugin.networks.patch_vit import PatchViT
from nnssl_plugin.nnunet.plans import build_network

DATASET_JSON = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "body": 1}}


def network_of(family):
    torch.manual_seed(0)
    if family == "patch_vit":
        return PatchViT(2, 2, patch_size=(4, 4, 4), embed_dim=24, depth=2, num_heads=2, decoder_width=4), (16,) * 3
    change = {"primus": with_primus, "segresnet": with_segresnet, "swin": with_swin}.get(family, lambda plan: plan)
    plan = change(fake_plan(residual=family == "residual"))
    return build_network(plan, "3d_fullres", DATASET_JSON), tuple(plan["configurations"]["3d_fullres"]["patch_size"])


def loss_of(output, target):
    """Of all maps of deep supervision, halved from one to the next."""
    outputs = output if isinstance(output, list) else [output]
    return sum(functional.mse_loss(o[:, :1], target[..., : o.shape[-1]]) / 2**n for n, o in enumerate(outputs[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["plain", "residual", "segresnet", "swin", "primus", "patch_vit"])
def test_the_value_and_the_gradients_are_those_of_the_equations(family):
    network, size = network_of(family)
    network.eval()  # the same dropout and paths in both
    first, second, target = torch.randn(1, 2, *size), torch.randn(1, 2, *size), torch.randn(1, 1, *size)
    weight, seen = 0.3, []

    reader = reader_of(network)
    features = [reader.features(x)[-1] for x in (first, second)]
    outputs = [network(x) for x in (first, second)]
    distance = (features[0] - features[1]).square().mean()
    expected = loss_of(outputs[0], target) + loss_of(outputs[1], target) + weight * distance
    gradients = torch.autograd.grad(expected, list(network.parameters()), allow_unused=True)

    subject = PairLoss(loss_of, network, weight)
    reader.on_bottleneck(seen.append)
    found = subject(network(torch.cat((first, second))), target)
    assert len(seen) == 1  # one pass for both copies
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, list(network.parameters()), allow_unused=True), gradients, strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert subject.mean_difference() == pytest.approx(distance.item(), rel=1e-4)
    assert subject.mean_difference() != subject.mean_difference()  # NaN: taken already


def test_without_weight_and_replacements_it_is_twice_the_loss_and_equal_copies_are_consistent():
    network, size = network_of("plain")
    image, target = torch.randn(2, 2, *size), torch.randn(2, 1, *size)
    ordinary = loss_of(network(image), target)
    for weight in (0.0, 5.0):
        subject = PairLoss(loss_of, network, weight)
        found = subject(network(torch.cat((image, image))), target)
        torch.testing.assert_close(found, 2 * ordinary)
        assert subject.mean_difference() == 0


def test_in_test_mode_it_is_the_loss_and_nothing_is_kept():
    network, size = network_of("plain")
    subject = PairLoss(loss_of, network, 0.1).eval()
    image, target = torch.randn(3, 2, *size), torch.randn(3, 1, *size)
    output = network(image)
    assert torch.equal(subject(output, target), loss_of(output, target))
    assert subject._features is None


def test_the_halves_of_any_output():
    x = torch.arange(4)
    assert half({"a": x, "b": [x, x]}, 1)["b"][0].tolist() == [2, 3]
    assert half((x,), 0)[0].tolist() == [0, 1]


@pytest.mark.slow
def test_a_compiled_network_gives_its_features_too():
    network, size = network_of("plain")
    image, target = torch.randn(2, 2, *size), torch.randn(1, 1, *size)
    expected = PairLoss(loss_of, network, 0.7)(network(image), target)
    subject = PairLoss(loss_of, network, 0.7)
    found = subject(torch.compile(network, backend="aot_eager")(image), target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.backward()
    assert all(p.grad is not None for p in network.encoder.parameters())
