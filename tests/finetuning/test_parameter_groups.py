"""Recipes of fine-tuning: who moves when and how fast, for U-Nets and Primus; what contradicts is refused."""

import math
from dataclasses import asdict

import pytest
import torch
from fake_dataset import fake_plan
from small_primus import with_primus
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.parameter_groups import (
    OPTIMISATIONS,
    build_optimizer,
    freeze_the_rest,
    optimisation_for,
    parameter_groups,
    rest_at_test_mode,
)
from nnssl_plugin.finetuning.settings import FinetuningSettings, read_settings
from nnssl_plugin.networks.family import parts_of
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.training.schedules import PolySchedule

DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
PLANS = {"plain": fake_plan(), "residual": fake_plan(residual=True), "primus": with_primus(fake_plan())}
HEADS = {"plain": "decoder.seg_layers.", "residual": "decoder.seg_layers.", "primus": "up_projection.decode.1."}
ENCODERS = {"plain": ("encoder.",), "residual": ("encoder.",), "primus": ("down_projection.", "eva.")}

every_network = pytest.mark.parametrize("kind", PLANS)


def build(kind):
    torch.manual_seed(0)
    return build_network(PLANS[kind], "3d_fullres", DATASET_JSON)


def names_in(network, group):
    held = {id(p) for p in group["params"]}
    return {name for name, p in network.named_parameters() if id(p) in held}


@every_network
def test_groups_hold_every_parameter_once(kind):
    network = build(kind)
    groups = parameter_groups(network, layer_decay=0.5, frozen_until=3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    depth = len(groups) - 1
    assert [group["lr_scale"] for group in groups] == [1.0] + [0.5 ** (depth - n) for n in range(depth)]
    assert [group["frozen_until"] for group in groups] == [0] + [3] * depth
    for name in names_in(network, groups[0]):
        assert not name.startswith(ENCODERS[kind])


def test_the_blocks_of_primus_are_its_stages():
    network = build("primus")
    groups = parameter_groups(network, layer_decay=0.5)
    assert [group["name"] for group in groups] == ["decoder", "encoder block 0", "encoder block 1"]
    first, last = names_in(network, groups[1]), names_in(network, groups[2])
    assert {"eva.pos_embed", "down_projection.proj.weight"} <= first and "eva.norm.weight" in last
    assert {name.split(".")[2] for name in first if name.startswith("eva.blocks")} == {"0"}
    assert names_in(network, groups[0]) == {
        name for name, _ in network.named_parameters() if name.startswith("up_projection.")
    }


@every_network
def test_a_linear_probe_moves_the_last_layers_alone(kind):
    network = build(kind)
    groups = parameter_groups(network, trains="head")
    freeze_the_rest(network, groups)
    moving = {name for name, p in network.named_parameters() if p.requires_grad}
    assert moving and all(name.startswith(HEADS[kind]) for name in moving)
    assert moving == {name for name, _ in network.named_parameters() if name.startswith(HEADS[kind])}
    network.train()
    rest_at_test_mode(network)
    head = network.get_submodule(HEADS[kind].rstrip("."))
    assert head.training and not any(
        module.training for module in network.modules() if isinstance(module, (nn.InstanceNorm3d, nn.LayerNorm))
    )


@every_network
def test_a_frozen_encoder_leaves_the_whole_decoder_moving(kind):
    network = build(kind)
    groups = parameter_groups(network, trains="decoder")
    freeze_the_rest(network, groups)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (not name.startswith(ENCODERS[kind])), name


def test_by_default_everything_moves_at_one_rate_whatever_the_network():
    (group,) = parameter_groups(nn.Linear(2, 2))
    assert group["name"] == "network" and len(group["params"]) == 2
    for settings in ({"layer_decay": 0.9}, {"trains": "head"}, {"frozen_until": 2}):
        with pytest.raises(UserError, match="no encoder stages"):
            parameter_groups(nn.Linear(2, 2), **settings)
    assert parts_of(nn.Linear(2, 2)) is None


def test_the_optimiser_is_that_of_nnunets_own_trainer():
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    def reference(kind, lr, weight_decay, **attributes):
        trainer = object.__new__(kind)
        trainer.__dict__.update(
            network=nn.Linear(2, 2),
            initial_lr=lr,
            weight_decay=weight_decay,
            num_epochs=10,
            print_to_log_file=lambda *arguments: None,
            **attributes,
        )
        return trainer.configure_optimizers()[0]

    stage = {"training_stage": None, "warmup_duration_whole_net": 2, "current_epoch": 0, "device": torch.device("cpu")}
    expected = {"plain": reference(nnUNetTrainer, 1e-2, 3e-5), "primus": reference(AbstractPrimus, 3e-4, 5e-2, **stage)}
    for kind, theirs in expected.items():
        network = build(kind)
        chosen = optimisation_for(network, None)
        ours = build_optimizer(parameter_groups(network), chosen, lr=chosen.lr, weight_decay=chosen.weight_decay)
        assert type(ours) is type(theirs)
        differing = {key for key in theirs.defaults if ours.defaults[key] != theirs.defaults[key]} - {"lr"}
        assert differing == set()


def test_the_numbers_are_those_of_the_primus_trainers_constructor():
    import inspect

    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    text = inspect.getsource(AbstractPrimus)
    assert "self.initial_lr = 3e-4" in text and "self.weight_decay = 5e-2" in text
    assert "clip_grad_norm_(self.network.parameters(), 1)" in text
    adamw = OPTIMISATIONS["adamw"]
    assert (adamw.lr, adamw.weight_decay, adamw.gradient_clip) == (3e-4, 5e-2, 1)


@pytest.mark.parametrize(("kind", "norm"), [("adamw", 1.0), ("sgd", 30.0)])
def test_gradients_are_clipped_where_nnunets_clip_is_too_wide(kind, norm):
    layer = nn.Linear(3, 1, bias=False)
    optimizer = build_optimizer(parameter_groups(layer), OPTIMISATIONS[kind], lr=1e-3, weight_decay=0.0)
    layer.weight.grad = torch.tensor([[10.0, 20.0, 20.0]])
    optimizer.step()
    assert float(layer.weight.grad.norm()) == pytest.approx(norm, rel=1e-4)


def test_a_plan_may_choose_the_other_optimiser():
    assert optimisation_for(build("primus"), "sgd") is OPTIMISATIONS["sgd"]
    assert optimisation_for(build("plain"), "adamw") is OPTIMISATIONS["adamw"]


def sawtooth(first, total, warmup, lr):
    """Two runs one after the other, each a linear rise and nnU-Net's decay."""

    def run(length, rise):
        return [
            lr * (k + 1) / (rise + 1) if k < rise else lr * (1 - (k - rise) / (length - rise)) ** 0.9
            for k in range(length)
        ]

    return run(first, first / 2) + run(total - first, warmup)


@pytest.mark.parametrize(("first", "warmup"), [(4, 2), (10, 5), (3, 0)])
def test_the_decoders_warm_up_is_a_tooth_of_its_own(first, warmup):
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], **extra} for extra in ({}, {"lr_scale": 0.5, "frozen_until": first})
    ]
    schedule = PolySchedule(torch.optim.SGD(groups, lr=1.0), lr=0.1, total=30, warmup=warmup, first_cycle=first)
    for epoch, expected in enumerate(sawtooth(first, 30, warmup, 0.1)):
        schedule.step(epoch)
        decoder, encoder = schedule.get_last_lr()
        assert decoder == pytest.approx(expected)
        assert encoder == pytest.approx(0 if epoch < first else expected / 2)
    schedule.step(30)
    assert schedule.get_last_lr() == [0.0, 0.0]


def test_teeth_that_do_not_fit_are_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match="warm-up of 6 after 5 in which the decoder trains alone"):
        PolySchedule(optimizer, lr=0.1, total=10, warmup=6, first_cycle=5)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"trains": "head", "layer_decay": 0.5}, "layer_decay cannot apply"),
        ({"trains": "decoder", "frozen_encoder_epochs": 2}, "frozen_encoder_epochs cannot apply"),
        ({"trains": "head", "decoder_warmup_epochs": 2, "layer_decay": 0.5}, "layer_decay and decoder_warmup_epochs"),
        ({"frozen_encoder_epochs": 1, "decoder_warmup_epochs": 1}, "both say how long"),
        ({"trains": "encoder"}, "one of all, decoder, head"),
        ({"optimiser": "lion"}, "sgd, adamw or null"),
        ({"weight_decay": -1}, "a number from 0 or null"),
        ({"decoder_warmup_epochs": -1}, "a whole number from 0"),
    ],
)
def test_contradictions_and_unknown_values_are_refused(block, said):
    with pytest.raises(UserError, match=said):
        read_settings({"plans_name": "p", "finetuning": {"weights": None} | block}, "3d_fullres")


def test_every_recipe_of_the_how_to_is_accepted(repository):
    page = (repository / "docs" / "how-to" / "fine-tune.md").read_text()
    recipes = [line.split("|")[2] for line in page.splitlines() if line.startswith("|") and "`finetuning." in line]
    assert len(recipes) >= 4
    for recipe in recipes:
        values = dict(pair.removeprefix("finetuning.").split("=") for pair in recipe.strip(" `").split())
        settings = {
            key: value if key in ("trains", "optimiser") else float(value) if "." in value else int(value)
            for key, value in values.items()
        }
        assert asdict(FinetuningSettings(**settings)).items() >= settings.items()
        assert all(math.isfinite(v) for v in settings.values() if not isinstance(v, str))
