"""S2DCPretrainer on planned networks: U-Nets and Primus, channels, 2D, tiles, resume, weights to start from."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME
from pretraining_harness import assert_same, make_trainer, run, state_of
from small_primus import with_primus
from small_swin import with_swin

from nnssl_plugin.methods.s2dc.trainer import S2DCPretrainer

METHOD = {"hidden": 16, "dim": 8, "queue": 6, "token_stride": 4, "momentum": 0.9}
SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "validation_iterations": 1,
    "batch_size": 2,
    "lr": 1e-3,
    "warmup_epochs": 0,
}
TERMS = ("global", "p2p", "p2s")


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch, request):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        if name == "draw_progress" or "draws" not in request.node.name:
            monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def arguments(more=(), **method):
    return {"trainer_class": S2DCPretrainer, "pretraining": SMALL | dict(more) | {"method": METHOD | method}}


def assert_finite(trainer):
    history = trainer.log.history()
    for name in TERMS:
        assert np.isfinite(history[f"train/{name}"]).all() and np.isfinite(history[f"val/{name}"]).all()
    assert history["skipped_steps"] == [0.0]


@pytest.mark.parametrize("residual, channels, dimensions", [(False, 1, 3), (True, 4, 3), (False, 2, 2)])
def test_trains_the_encoder_alone(residual, channels, dimensions):
    trainer = make_trainer(**arguments(), channels=channels, residual=residual, dimensions=dimensions)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.backbone.network.state_dict().items()}
    trainer.run_training()
    after = trainer.task.backbone.network.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    weights = {k for k in before if "encoder." in k and k.endswith("weight") and before[k].ndim > 1}
    assert weights <= moved and all("encoder." in key for key in moved)
    assert_finite(trainer)
    assert np.isfinite(trainer.log.history()["diagnostics/matching_accuracy"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("with_network", [with_primus, with_swin])
def test_trains_transformers(with_network):
    planned = make_trainer(**arguments())
    plan = with_network(planned.plans_manager.plans) | {"continue_training": False}
    trainer = S2DCPretrainer(plan, "3d_fullres", "all", planned.dataset_json, torch.device("cpu"))
    trainer.run_training()
    assert_finite(trainer)


@pytest.mark.parametrize(
    "more, options",
    [
        ({}, {"grid": [1, 2, 1]}),
        ({"chunk_size": 1}, {"assignment": "sinkhorn", "sinkhorn_iterations": 5, "negatives": True}),
    ],
)
def test_trains_with_sub_volumes_and_with_sinkhorn_in_a_virtual_batch(more, options):
    assert_finite(run(**arguments(more, **options)))


def test_stopped_and_resumed_equals_one_go():
    epochs = {"epochs": 2, "iterations_per_epoch": 2}
    reference = state_of(run(**arguments(epochs)))
    trainer = make_trainer(**arguments(epochs))
    step = trainer.train_step

    def stopping(batch):
        if trainer.step == 2:
            trainer.interruption.reason = "test"
        return step(batch)

    trainer.train_step = stopping
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert trainer.step == 3
    resumed = make_trainer(**arguments(epochs), resume="checkpoint_latest.pth")
    resumed.run_training()
    assert_same(reference, state_of(resumed))


def test_the_checkpoint_keeps_teacher_and_queue_beside_the_network():
    trainer = run(**arguments())
    checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=True)
    kept = checkpoint["ssl_state"]["task"]
    assert kept["queue.features"].shape == (6, 8)
    assert {key.partition(".")[0] for key in kept} == {"backbone", "heads", "teacher", "norms", "queue"}
    assert not any(key.startswith("backbone.network.") for key in kept)
    assert checkpoint["provenance"]["trained"] == ["encoder.", "decoder.encoder."]
    assert checkpoint["provenance"]["method"] == "s2dc"
    assert "S2DC" in checkpoint["citations"][0]["apa_citations"][0]


def test_weights_to_start_from_reach_student_and_teacher():
    source = run(**arguments())
    weights = Path(os.environ["nnUNet_preprocessed"], NAME, "source.pth")
    weights.write_bytes(Path(source.output_folder, "checkpoint_final.pth").read_bytes())
    trainer = make_trainer(**arguments({"weights": "source.pth"}))
    trainer.on_train_start()
    trainer.interruption.release()
    expected = source.task.backbone.network.encoder.state_dict()
    for backbone in (trainer.task.backbone, trainer.task.teacher["backbone"].module):
        state = backbone.network.encoder.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in expected.items())


def test_draws_views_similarities_and_components():
    trainer = run(**arguments(), channels=1)
    for name in ("views", "similarity", "components"):
        assert Path(trainer.output_folder, "figures", f"{name}_epoch_0000.png").stat().st_size > 5_000


def test_a_queue_longer_than_the_dataset_is_told():
    trainer = run(**arguments(queue=600))
    (log,) = Path(trainer.output_folder).glob("training_log*.txt")
    assert "the queue holds 600 features" in log.read_text()


def test_nnunet_finds_the_trainer_by_name():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    assert recursive_find_trainer_class_by_name("S2DCPretrainer") is S2DCPretrainer
