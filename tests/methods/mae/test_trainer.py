"""MAEPretrainer on planned networks: what is trained, channels, 2D, transformers, chunks, exact resume."""

import numpy as np
import pytest
import torch
from method_checks import assert_resumes_exactly
from pretraining_harness import make_trainer, run
from small_primus import with_primus
from small_swin import with_swin

from nnssl_plugin.io.files import read_json
from nnssl_plugin.methods.mae.trainer import MAEPretrainer

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "validation_iterations": 1,
    "batch_size": 2,
    "warmup_epochs": 0,
}
NUMBERS = ("train/reconstruction", "val/reconstruction", "diagnostics/masked_error", "diagnostics/visible_mean_error")


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def arguments(more=(), **method):
    return {"trainer_class": MAEPretrainer, "pretraining": SMALL | dict(more) | {"method": method}}


def assert_finite(trainer):
    history = trainer.log.history()
    for name in NUMBERS:
        assert np.isfinite(history[name]).all(), name
    assert history["skipped_steps"] == [0.0]


@pytest.mark.parametrize("residual, channels, dimensions", [(False, 1, 3), (True, 4, 3), (False, 2, 2)])
def test_trains_the_encoder_and_the_decoder_but_not_the_segmentation_layers(residual, channels, dimensions):
    trainer = make_trainer(**arguments(), channels=channels, residual=residual, dimensions=dimensions)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.backbone.network.state_dict().items()}
    trainer.run_training()
    after = trainer.task.backbone.network.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    weights = {k for k in before if k.endswith("weight") and before[k].ndim > 1 and "seg_layers" not in k}
    assert weights <= moved and not any("seg_layers" in key for key in moved)
    assert_finite(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("with_network", [with_primus, with_swin])
def test_trains_transformers(with_network):
    planned = make_trainer(**arguments())
    plan = with_network(planned.plans_manager.plans) | {"continue_training": False}
    trainer = MAEPretrainer(plan, "3d_fullres", "all", planned.dataset_json, torch.device("cpu"))
    trainer.run_training()
    assert_finite(trainer)


def test_trains_in_a_virtual_batch_of_chunks_on_all_voxels():
    assert_finite(run(**arguments({"chunk_size": 1}, loss_on="all", ratio=0.5, block=8)))


@pytest.mark.parametrize("preset", ["mae-openmind", "mae-nnfoundation"])
def test_trains_by_the_sgd_of_the_presets(preset, repository):
    block = read_json(repository / "plans" / f"{preset}.json")["pretraining"]
    trainer = run(trainer_class=MAEPretrainer, pretraining=block | SMALL | {"chunk_size": None, "method": {}})
    assert type(trainer.optimizer) is torch.optim.SGD
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 3e-5)
    assert group["lr"] == pytest.approx(1e-2 * 0.5**0.9)  # the second of two steps
    assert_finite(trainer)


def test_windows_larger_than_the_case_are_padded_and_the_padding_does_not_count():
    trainer = run(**arguments(), shape=(10, 20, 17))
    batch = trainer.dataloader_train.batches[0]
    inside = trainer._views(batch, 0, 0)["inside"]
    assert inside.sum((1, 2, 3, 4)).tolist() == [10 * 16 * 16] * 2
    assert (batch["image"][~inside.expand(-1, 2, -1, -1, -1)] == 0).all()
    assert_finite(trainer)


def test_resume():
    assert_resumes_exactly(MAEPretrainer, channels=1, pretraining={"batch_size": 2, "warmup_epochs": 0})
