"""Recomputed activations: results and gradients bit for bit, dropout included; less is kept; teachers and refusals."""

import copy
import gc

import pytest
import torch
from fake_dataset import fake_plan
from method_checks import TWO_EPOCHS, assert_resumes_exactly
from pretraining_harness import assert_same, run, state_of
from small_primus import with_primus
from small_segresnet import with_segresnet
from torch import nn
from toy_method import ToyPretrainer

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.fast_blocks import use_fast_blocks
from nnssl_plugin.networks.patch_vit import PatchViT
from nnssl_plugin.networks.recomputing import Recomputed, recompute_activations
from nnssl_plugin.networks.teacher import Teacher
from nnssl_plugin.nnunet.plans import build_network

LABELS = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}
DROPOUT = {"dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}


def network_of(kind: str) -> nn.Module:
    """A small network in training mode, with dropout or stochastic depth where it has any."""
    torch.manual_seed(0)
    if kind == "patch-vit":
        return PatchViT(
            1, 2, patch_size=[4, 4, 4], embed_dim=24, depth=3, num_heads=2, decoder_width=8, drop_path_rate=0.5
        )
    plan = fake_plan(residual=kind == "residual", dimensions=2 if kind == "2d" else 3)
    configuration = next(iter(plan["configurations"]))
    if kind == "primus":
        plan = with_primus(plan, drop_path_rate=0.5)
    elif kind == "dropout":
        plan["configurations"][configuration]["architecture"]["arch_kwargs"] |= DROPOUT
    network = build_network(plan, configuration, LABELS)
    if kind == "fast":
        use_fast_blocks(network)
    return network


def image_for(kind: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, *[16] * (2 if kind == "2d" else 3), generator=torch.Generator().manual_seed(1))


def maps_of(network, x) -> list[torch.Tensor]:
    """What comes out, at one resolution or several."""
    results = network(x)
    return results if isinstance(results, list) else [results]


def outcome(network, x):
    """The loss, all gradients, and what random numbers come next."""
    torch.manual_seed(3)
    total = sum(each.square().mean() for each in maps_of(network.train(), x))
    total.backward()
    return [total.detach(), *(p.grad for p in network.parameters() if p.grad is not None), torch.rand(3)]


KINDS = ["plain", "2d", "residual", "dropout", "fast", "primus", "patch-vit"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_equal_bit_for_bit(kind, batch):
    stock, recomputing = network_of(kind), network_of(kind)
    recompute_activations(recomputing)
    keys, x = list(stock.state_dict()), image_for(kind, batch)
    assert any(isinstance(module, Recomputed) for module in recomputing.modules())
    assert_same(outcome(recomputing, x), outcome(stock, x))
    assert list(recomputing.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "primus", "patch-vit"])
def test_fewer_numbers_are_kept_until_the_backward_pass(kind):
    kept = []
    for recomputing in (False, True):
        network, alive = network_of(kind), []
        if recomputing:
            recompute_activations(network)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, alive=alive: (alive.append(x.numel()), x)[1], lambda x: x
        ):
            maps_of(network.train(), image_for(kind))
        gc.collect()
        kept.append(sum(alive))
    assert kept[1] < kept[0]  # what is kept of the inputs is not seen here: benchmarks/memory.py counts it


def test_twice_is_once_and_nothing_is_recomputed_without_a_gradient():
    network = network_of("plain")
    recompute_activations(network)
    recompute_activations(network)
    assert not any("RecomputedRecomputed" in type(module).__name__ for module in network.modules())
    calls = []
    network.encoder.stages[0][0].convs[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(image_for("plain"))
    assert len(calls) == 1
    sum(each.sum() for each in maps_of(network, image_for("plain"))).backward()
    assert len(calls) == 3


def test_a_teacher_is_a_network_of_its_own():
    network = network_of("plain")
    recompute_activations(network)
    backbone = Backbone(network, 1)
    teacher, x = Teacher(backbone, 0.9), image_for("plain")
    before = [each.clone() for each in teacher.module.features(x)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    torch.testing.assert_close(teacher.module.features(x), before, rtol=0, atol=0)
    assert copy.deepcopy(network).state_dict().keys() == network.state_dict().keys()


def test_other_networks_are_refused_in_words():
    pytest.importorskip("monai")
    network = build_network(with_segresnet(fake_plan()), "3d_fullres", LABELS)
    with pytest.raises(UserError, match="recompute their activations") as error:
        recompute_activations(network)
    assert "recompute" in error.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_pretraining_goes_the_same_way_bit_for_bit(monkeypatch, chunk_size):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    settings = {"chunk_size": chunk_size} | TWO_EPOCHS
    states = [state_of(run(pretraining={"recompute": chosen} | settings)) for chosen in (True, False)]
    assert_same(*states)


@pytest.mark.slow
def test_pretraining_resumes_exactly(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert_resumes_exactly(ToyPretrainer, pretraining={"recompute": True} | TWO_EPOCHS)


def test_the_fine_tuning_trainer_recomputes_where_the_plan_says_so():
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer

    for chosen in (False, True):
        plans = PlansManager(fake_plan() | {"finetuning": {"weights": None, "recompute": chosen}})
        network = PretrainedSegmentationTrainer.build_network_architecture(
            plans, plans.get_configuration("3d_fullres"), 1, 2, enable_deep_supervision=True
        )
        assert any(isinstance(module, Recomputed) for module in network.modules()) == chosen
