"""MAE with aligned contrast on two ranks (gloo, CPU): the points of both are compared with one another."""

import pytest
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer
from ranks import RANKS, on_two_ranks

from nnssl_plugin.methods.mae.contrast.trainer import MAEContrastPretrainer

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "validation_iterations": 1,
    "warmup_epochs": 0,
    "batch_size": 2,
    "method": {"contrast_from": 0.0, "dim": 8},
}


def train(rank):
    trainer = make_trainer(trainer_class=MAEContrastPretrainer, pretraining=SMALL)
    trainer.initialize()
    seen, loss = [], trainer.task.loss
    trainer.task.loss = lambda outputs, progress: (seen.append(outputs["case"]), loss(outputs, progress))[1]
    trainer.run_training()
    return {"state": dict(trainer.task.state_dict()), "cases": seen}


@pytest.mark.slow
def test_both_ranks_compare_the_points_of_all_cases(nnunet_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(channels=2)
    first, second = on_two_ranks(train, tmp_path)
    assert_same(first["state"], second["state"])
    for a, b in zip(first["cases"], second["cases"], strict=True):
        assert a.tolist() == b.tolist() and len(set(a.tolist())) == 2 * RANKS
