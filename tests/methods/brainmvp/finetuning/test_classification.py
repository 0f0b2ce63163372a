"""BrainMVP's classification trainer: both copies through encoder and head, validation as it is, exact resume."""

import os
import signal

import numpy as np
import pytest
import torch
from labelled_dataset import SHORT, class_labels
from pretraining_harness import assert_same

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.methods.brainmvp.finetuning.trainer import BrainMVPClassificationTrainer
from nnssl_plugin.nnunet.case_labels import write_class_labels
from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer


@pytest.fixture
def folder(adapted):
    folder = adapted(4, present={f"case_{i:02d}": [c for c in range(4) if c != i % 4] for i in range(6)})
    raw = os.path.join(os.environ["nnUNet_raw"], folder.name)
    write_json(f"{raw}/dataset.json", read_json(folder / "dataset.json"))
    write_class_labels(raw, class_labels())
    names = [f"case_{i:02d}" for i in range(6)]
    write_json(folder / "splits_final.json", [{"train": names[2:], "val": names[:2]}])
    return folder


def trainer(folder, *, kind=BrainMVPClassificationTrainer, resume=None, method=None, fold=0, **classification):
    plan = read_json(folder / "nnUNetPlans-toy.json") | {"classification": SHORT | classification}
    plan["finetuning"]["method"] = method or {}
    plan["continue_training"] = resume is not None
    subject = kind(plan, "3d_fullres", fold, read_json(folder / "dataset.json"), torch.device("cpu"))
    if resume:
        subject.load_checkpoint(os.path.join(subject.output_folder, resume))
    return subject


@pytest.mark.parametrize("inputs", ["resize", "windows"])
def test_the_loss_is_that_of_both_copies_and_their_consistency(folder, inputs):
    subject = trainer(folder, method={"consistency": 2.0}, inputs=inputs, windows=2)
    subject.on_train_start()
    subject.on_train_epoch_start()
    batch = next(subject.dataloader_train)
    windows = 2 if inputs == "windows" else 1
    assert batch["data"].shape == (2, windows, 8, 16, 16, 16)
    copies = subject.mixing.copies(batch["data"].transpose(1, 2), batch["case"], 0).transpose(1, 2)
    assert copies.shape == (4, windows, 4, 16, 16, 16)
    with torch.no_grad():
        maps = [subject.network.backbone.features(copy.flatten(0, 1))[-1] for copy in copies.chunk(2)]
        supervised = sum(subject.loss.loss(subject.network(copy), batch["target"]) for copy in copies.chunk(2))
    expected = supervised + 2.0 * (maps[0] - maps[1]).square().mean()
    assert float(subject.train_step(batch)["loss"]) == pytest.approx(expected.item(), rel=1e-5)


def test_without_replacements_and_weight_the_loss_is_twice_the_ordinary_one(folder):
    losses = []
    for kind, method in (
        (BrainMVPClassificationTrainer, {"most_replaced": 0, "consistency": 0.0}),
        (PretrainedClassificationTrainer, {}),
    ):
        subject = trainer(folder, kind=kind, method=method)
        subject.on_train_start()
        subject.on_train_epoch_start()
        losses.append(float(subject.train_step(next(subject.dataloader_train))["loss"]))
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)


def state(subject):
    return {"network": subject.network.state_dict(), "optimizer": subject.optimizer.state_dict()}


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_and_is_validated_as_ever(folder):
    reference = trainer(folder)
    reference.run_training()
    history = reference.log.history()
    assert np.isfinite(history["val_losses"]).all() and min(history["consistency"]) > 0
    expected = state(reference)
    subject = trainer(folder)
    step = subject.train_step

    def stopping(batch):
        if subject.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    subject.train_step = stopping
    with pytest.raises(SystemExit):
        subject.run_training()
    resumed = trainer(folder, resume="checkpoint_latest.pth")
    assert resumed.step == 5
    resumed.run_training()
    assert_same(state(resumed), expected)
    resumed.perform_actual_validation()
    assert list(os.scandir(os.path.join(resumed.output_folder, "validation")))
