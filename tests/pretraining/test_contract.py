"""Every clause of the contract, used by the toy method: exact resume, and equal state on two ranks."""

import pytest
import torch
from fake_dataset import write_fake_dataset
from method_checks import assert_resumes_exactly
from pretraining_harness import assert_same, make_trainer
from ranks import on_two_ranks
from toy_variants import VARIANTS

SHORT = {"epochs": 1, "iterations_per_epoch": 2, "validation_iterations": 0}


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


@pytest.mark.parametrize("clause", VARIANTS)
def test_it_resumes_exactly(clause):
    variant = VARIANTS[clause]
    variant.prepare()
    assert_resumes_exactly(variant.trainer, **variant.plan)


def train_all(rank):
    """The state of every variant after two steps."""
    states = {}
    for number, (clause, variant) in enumerate(VARIANTS.items()):
        block = SHORT | variant.plan.get("pretraining", {})
        trainer = make_trainer(trainer_class=variant.trainer, **variant.plan | {"pretraining": block})
        trainer.output_folder += f"_{number}"
        trainer.disable_checkpointing = True
        trainer.run_training()
        states[clause] = dict(trainer.task.state_dict())
    return states


@pytest.mark.slow
def test_two_ranks_keep_the_same_state(tmp_path):
    write_fake_dataset(channels=2)  # once, before the ranks look for it
    for variant in VARIANTS.values():
        variant.prepare()
    first, second = on_two_ranks(train_all, tmp_path)
    assert list(first) == list(VARIANTS)
    assert_same(first, second)
    assert all(torch.isfinite(value).all() for state in first.values() for value in state.values())
