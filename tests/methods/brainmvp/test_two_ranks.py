"""BrainMVP on two ranks (gloo, CPU): one set of templates, and the gradient of both ranks' samples together."""

import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer
from ranks import on_two_ranks

from nnssl_plugin.methods.brainmvp.trainer import BrainMVPPretrainer

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 3,
    "validation_iterations": 1,
    "batch_size": 2,
    "method": {"contrast_from": 0.0},
}


def train(rank):
    trainer = make_trainer(trainer_class=BrainMVPPretrainer, pretraining=SMALL, channels=3)
    trainer.on_train_start()
    views = trainer._views(next(trainer.dataloader_train), 0, 0)
    trainer._backward(views, 0.5)
    names = ("templates", "backbone.network.encoder.stages.0.0.convs.0.conv.weight")
    parameters = dict(trainer.task.named_parameters())
    first = {"views": views, "gradients": {name: parameters[name].grad.clone() for name in names}}
    first["weights"] = {name: value.clone() for name, value in trainer.task.state_dict().items()}
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    return first | {"state": dict(trainer.task.state_dict())}


@pytest.mark.slow
def test_two_ranks_are_one_of_both_batches(nnunet_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(channels=3)
    first, second = on_two_ranks(train, tmp_path)
    assert_same(first["state"], second["state"])
    assert_same(first["gradients"], second["gradients"])
    alone = make_trainer(trainer_class=BrainMVPPretrainer, pretraining=SMALL, channels=3)
    alone.initialize()
    alone.task.load_state_dict(first["weights"])
    views = {name: torch.cat([each["views"][name] for each in (first, second)]) for name in first["views"]}
    alone._backward(views, 0.5)
    parameters = dict(alone.task.named_parameters())
    for name, gradient in first["gradients"].items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-5, rtol=1e-3)
