"""The optimisers of pretraining: PyTorch's numbers, skipped steps that leave no trace, exact resume, two ranks."""

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from method_checks import assert_resumes_exactly
from pretraining_harness import assert_same, make_trainer, run
from ranks import on_two_ranks
from torch import nn
from toy_method import Toy, ToyPretrainer
from toy_variants import ADAMW, SGD

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.optimisation import optimisation_of
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import settings_from

KINDS = [SGD, SGD | {"momentum": 0.0}, ADAMW]
IDS = ["sgd", "sgd without momentum", "adamw"]


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


class Layer(nn.Module):
    """As much of a task as the optimiser asks for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.backbone = self

    def parts(self):
        return None

    def parameter_groups(self):
        return [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "weight_decay": 0.0}]


def steps(kind, *, broken=(), number=6):
    """The parameters after steps with fixed gradients; those in ``broken`` are skipped on the device."""
    task = Layer()
    optimizer, schedules = optimisation_of(task, settings_from(kind, TrainingSettings(), "test"), total=10)
    generator = torch.Generator().manual_seed(1)
    for step in range(number):
        schedules.step(step)
        for parameter in task.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step in broken:
                parameter.grad.fill_(torch.nan)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step in broken))
        optimizer.step()
    return [p.detach() for p in task.parameters()], optimizer


@pytest.mark.parametrize("kind", [SGD, SGD | {"momentum": 0.0}, ADAMW | {"layer_decay": 1.0}], ids=IDS)
def test_steps_are_those_of_pytorch(kind):
    settings, task = settings_from(kind, TrainingSettings(), "test"), Layer()
    if kind.get("optimiser") == "sgd":
        theirs = torch.optim.SGD(
            task.parameter_groups(), 1.0, settings.momentum, 0.0, 3e-5, settings.momentum > 0, foreach=False
        )
    else:
        theirs = torch.optim.AdamW(task.parameter_groups(), 1.0, (0.8, 0.95), weight_decay=0.04, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        progress = step / 10
        rate = {"poly": 1e-2 * (1 - progress) ** 0.9, "halving": 1e-3 * 0.5 ** (step // 2)}[settings.schedule]
        for group in theirs.param_groups:
            group["lr"] = rate
        if settings.weight_decay_end is not None:
            theirs.param_groups[0]["weight_decay"] = 0.4 - 0.36 * (1 + np.cos(np.pi * progress)) / 2
        for parameter in task.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        theirs.step()
    torch.testing.assert_close(steps(kind)[0], [p.detach() for p in task.parameters()])


@pytest.mark.parametrize("kind", [SGD, SGD | {"momentum": 0.0}, ADAMW | {"layer_decay": 1.0}], ids=IDS)
def test_a_skipped_step_leaves_no_trace_not_even_the_first(kind):
    """PyTorch's fused SGD would else read momentum that was never written."""
    fresh = [p.detach() for p in Layer().parameters()]
    skipped, optimizer = steps(kind, broken={0}, number=1)
    assert_same(skipped, fresh)
    for state in optimizer.state.values():
        assert all(not value.any() for value in state.values())
    after, _ = steps(kind, broken={0}, number=2)
    assert all(torch.isfinite(p).all() for p in after) and not torch.equal(after[0], fresh[0])


def test_a_first_step_after_a_skipped_one_is_a_first_step():
    """SGD: the rate of its step times the gradient, whatever lay in memory before."""
    constant = SGD | {"weight_decay": 0.0}
    for _ in range(20):
        torch.full((64,), 1e30)  # memory that an uninitialised momentum would reuse
        (weight, _), _ = steps(constant, broken={0}, number=2)
        generator = torch.Generator().manual_seed(1)
        draws = [[torch.randn(p.shape, generator=generator) for p in Layer().parameters()] for _ in range(2)]
        expected = Layer().layer.weight.detach() - 1e-2 * 0.9**0.9 * (1 + 0.99) * draws[1][0]
        torch.testing.assert_close(weight, expected)


def test_it_resumes_exactly_without_momentum():
    """With it, and with AdamW: ``test_contract.py``."""
    assert_resumes_exactly(ToyPretrainer, pretraining=SGD | {"momentum": 0.0})


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_broken_first_step_changes_nothing_and_the_run_goes_on(kind):
    """The very first step is skipped: weights, teacher and queue stand still."""
    block = {"epochs": 1, "iterations_per_epoch": 3, "method": {"break_from": 0, "break_until": 1}}
    trainer = make_trainer(pretraining=kind | block)
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.task.state_dict().items()}
    step, after = trainer.train_step, {}

    def watched(batch):
        step(batch)
        after.update({} if after else {key: value.clone() for key, value in trainer.task.state_dict().items()})

    trainer.train_step = watched
    trainer.run_training()
    before.pop("steps"), after.pop("steps")
    assert_same(before, after)
    assert trainer.log.history()["skipped_steps"] == [1]
    assert all(torch.isfinite(value).all() for value in trainer.task.state_dict().values())


def test_settings_reach_the_groups():
    trainer = run(pretraining=ADAMW | {"epochs": 1})
    groups = trainer.optimizer.param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.95)}
    assert [group["lr"] for group in groups] == pytest.approx([1e-3 / 16 * s for s in (1, 0.7, 0.49, 0.343, 0.1)])
    expected = 0.4 - 0.36 * (1 + np.cos(np.pi * 4 / 5)) / 2
    assert [group["weight_decay"] for group in groups] == pytest.approx([expected] * 5)


@pytest.mark.parametrize(
    "block",
    [
        {"betas": [0.9, 1.0]},
        {"betas": 0.9},
        {"momentum": 1.0},
        {"optimiser": "adam"},
        {"schedule": "step"},
        {"weight_decay_end": -1},
        {"layer_decay": 0},
        {"layer_decay": 1.1},
    ],
)
def test_wrong_settings_are_named(block):
    with pytest.raises(UserError, match=next(iter(block))):
        make_trainer(pretraining=block)


def test_another_optimiser_does_not_go_on_from_the_checkpoint():
    run(pretraining={"epochs": 1})
    with pytest.raises(UserError, match="another optimiser"):
        make_trainer(pretraining=SGD | {"epochs": 1}, resume="checkpoint_final.pth")


class PairedToy(Toy):
    """Half as many rows as the batch has samples."""

    def views(self, batch, generator):
        return {name: view[::2] for name, view in super().views(batch, generator).items()}

    def encode(self, views):
        self.rows = [*getattr(self, "rows", []), len(views["student"])]
        return super().encode(views)


class PairedToyPretrainer(ToyPretrainer):
    def build_task(self, backbone):
        return PairedToy(backbone, self.method_settings)


@pytest.mark.parametrize(("chunk", "rows"), [(2, {2}), (3, {2}), (1, {1})])
def test_a_chunk_is_compared_with_the_rows_of_the_views(chunk, rows):
    block = {"epochs": 1, "iterations_per_epoch": 1, "validation_iterations": 1, "batch_size": 4, "chunk_size": chunk}
    trainer = run(trainer_class=PairedToyPretrainer, pretraining=block)
    assert set(trainer.task.rows) == rows
    assert np.isfinite(trainer.log.history()["train_losses"]).all()


def train_on_a_rank(rank):
    """State after a run with each optimiser whose first two steps are skipped."""
    results = []
    for kind in (SGD, ADAMW):
        trainer = make_trainer(pretraining=kind | {"epochs": 1, "method": {"break_from": 0, "break_until": 2}})
        trainer.run_training()
        results.append({"state": dict(trainer.task.state_dict()), "optimiser": trainer.optimizer.state_dict()["state"]})
    return results


@pytest.mark.slow
def test_two_ranks_stay_equal(nnunet_environment, tmp_path):
    write_fake_dataset(channels=2)
    first, second = on_two_ranks(train_on_a_rank, tmp_path)
    assert_same(first, second)
