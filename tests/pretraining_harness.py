"""Build, run, interrupt and compare pretrainers on the fake dataset, in one process."""

import os
from pathlib import Path

import torch
from fake_dataset import NAME, write_fake_dataset
from toy_method import ToyPretrainer

from nnssl_plugin.io.files import read_json


def make_trainer(*, trainer_class=ToyPretrainer, resume: str | None = None, fold="all", network=None, **dataset):
    """A trainer on the fake dataset of two channels; ``resume`` names a checkpoint of its folder, ``network`` puts
    another one into a configuration of the plan."""
    plan = write_fake_dataset(**{"channels": 2} | dataset)
    dataset_json = read_json(Path(os.environ["nnUNet_preprocessed"]) / NAME / "dataset.json")
    configuration = next(iter(plan["configurations"]))
    if network is not None:
        plan = network(plan, configuration)
    plan["continue_training"] = resume is not None
    trainer = trainer_class(plan, configuration, fold, dataset_json, torch.device("cpu"))
    if resume:
        trainer.load_checkpoint(os.path.join(trainer.output_folder, resume))
    return trainer


def run(**arguments):
    """Train to the end and return the trainer."""
    trainer = make_trainer(**arguments)
    trainer.run_training()
    return trainer


def state_of(trainer) -> dict:
    """Everything that must be equal after a resume."""
    return {
        "network": trainer.task.backbone.network.state_dict(),
        "task": trainer.task.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
    }


def assert_same(a, b, place: str = "state") -> None:
    """Equal types, keys and values; tensors bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    else:
        assert a == b, place
