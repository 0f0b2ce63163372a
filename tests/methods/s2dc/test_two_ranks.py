"""S2DC on two ranks (gloo, CPU): one teacher and one queue, fed by both."""

import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer
from ranks import RANKS, on_two_ranks

from nnssl_plugin.methods.s2dc.trainer import S2DCPretrainer

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 3,
    "validation_iterations": 1,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "batch_size": 2,
    "method": {"hidden": 16, "dim": 8, "queue": 16, "token_stride": 4, "momentum": 0.9},
}


def train(rank):
    trainer = make_trainer(trainer_class=S2DCPretrainer, pretraining=SMALL)
    trainer.initialize()
    start = trainer.task.queue.features.clone()
    trainer.run_training()
    fresh = (trainer.task.queue.features != start).any(1)
    return {"state": dict(trainer.task.state_dict()), "fresh": fresh}


@pytest.mark.slow
def test_both_ranks_hold_the_same_teacher_and_queue(nnunet_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(channels=2)
    first, second = on_two_ranks(train, tmp_path)
    assert_same(first["state"], second["state"])
    assert first["fresh"].sum() == 3 * 2 * RANKS  # each step brings the samples of both
    assert torch.equal(first["state"]["queue.pointer"], torch.tensor(12))
