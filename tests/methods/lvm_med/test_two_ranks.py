"""LVM-Med on two ranks (gloo, CPU): each matches its own graphs, and both learn from the mean."""

import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer
from ranks import RANKS, on_two_ranks

from nnssl_plugin.methods.lvm_med.trainer import LVMMedPretrainer

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 3,
    "validation_iterations": 1,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "batch_size": 4,
    "method": {"nodes": 4, "neighbours": 2, "dim": 8, "token_stride": 4, "noise": 1.0},
}


def train(rank):
    trainer = make_trainer(trainer_class=LVMMedPretrainer, pretraining=SMALL, dimensions=2)
    trainer.initialize()
    start = {k: v.clone() for k, v in trainer.task.state_dict().items()}
    rows, loss = [], trainer.task.loss
    trainer.task.loss = lambda outputs, progress: rows.append(len(outputs["source_z"])) or loss(outputs, progress)
    trainer.run_training()
    state = dict(trainer.task.state_dict())
    moved = any(not torch.equal(start[name], state[name]) for name in start)
    return {"state": state, "rows": rows, "moved": moved}


@pytest.mark.slow
def test_ranks_keep_their_graphs_and_end_with_the_same_weights(tmp_path, nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(dimensions=2, channels=2)
    first, second = on_two_ranks(train, tmp_path)
    assert first["rows"] == second["rows"] == [4] * 4 and first["moved"] and RANKS == 2
    assert_same(first["state"], second["state"])
