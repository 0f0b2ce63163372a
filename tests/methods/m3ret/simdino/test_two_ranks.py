"""SimDINO on two ranks (gloo, CPU): one teacher, and one coding rate over the images of both."""

import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer
from ranks import on_two_ranks
from small_patch_vit import with_patch_vit

from nnssl_plugin.methods.m3ret.simdino.trainer import M3RetSimDINOPretrainer
from nnssl_plugin.objectives.coding_rate import coding_rate, official_weight

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "validation_iterations": 1,
    "warmup_epochs": 0,
    "batch_size": 2,
    "method": {"hidden": 16, "width": 8, "local_views": 1},
}


def train(rank):
    trainer = make_trainer(trainer_class=M3RetSimDINOPretrainer, network=with_patch_vit, pretraining=SMALL, channels=1)
    trainer.initialize()
    seen = {}
    loss = trainer.task.loss

    def recording(outputs, progress):
        terms = loss(outputs, progress)
        seen.setdefault("outputs", {name: value.detach() for name, value in outputs.items()})
        seen.setdefault("expansion", terms["expansion"].detach())
        return terms

    trainer.task.loss = recording
    trainer.run_training()
    del trainer.task.loss
    return {"state": dict(trainer.task.state_dict()), **seen}


@pytest.mark.slow
def test_both_ranks_hold_the_same_networks_and_spread_the_images_of_both(nnunet_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(channels=1)
    first, second = on_two_ranks(train, tmp_path)
    assert_same(first["state"], second["state"])
    student, teacher = first["outputs"]["student"], first["outputs"]["teacher"]
    assert len(student) == 4  # two of each rank
    rates = [coding_rate((student[:, view] + teacher[:, view]) / 2, 0.5) for view in range(2)]
    torch.testing.assert_close(first["expansion"], -official_weight(8, 4) * (rates[0] + rates[1]) / 2)
    torch.testing.assert_close(first["expansion"], second["expansion"])
