"""MAEContrastPretrainer on planned networks: what is trained and logged, 2D, transformers, small cases, resume."""

import numpy as np
import pytest
import torch
from method_checks import assert_resumes_exactly
from pretraining_harness import make_trainer, run
from small_primus import with_primus

from nnssl_plugin.methods.mae.contrast.trainer import MAEContrastPretrainer

SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "validation_iterations": 2,
    "batch_size": 2,
    "warmup_epochs": 0,
    "method": {"contrast_from": 0.0, "dim": 8},
}
NUMBERS = (
    "train/reconstruction",
    "train/contrast",
    "val/contrast",
    "diagnostics/explained",
    "diagnostics/positive_cosine",
    "diagnostics/point_retrieval",
    "diagnostics/point_retrieval_chance",
    "feature_std",
)


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def assert_finite(trainer):
    history = trainer.log.history()
    for name in NUMBERS:
        assert np.isfinite(history[name]).all(), name
    assert history["skipped_steps"] == [0.0]


@pytest.mark.parametrize("residual, channels, dimensions", [(True, 4, 3), (False, 2, 2)])
def test_trains_encoder_decoder_and_projector_on_crops_of_the_plans_patch(residual, channels, dimensions):
    planned = {"channels": channels, "residual": residual, "dimensions": dimensions}
    trainer = make_trainer(trainer_class=MAEContrastPretrainer, pretraining=SMALL, **planned)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.state_dict().items()}
    trainer.run_training()
    after = trainer.task.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    weights = {k for k in before if k.endswith("weight") and before[k].ndim > 1 and "seg_layers" not in k}
    assert weights <= moved and not any("seg_layers" in key for key in moved)
    batch = trainer.dataloader_train.batches[0]
    assert batch["image"].shape[2:] == (26,) * dimensions
    assert trainer._views(batch, 0, 0)["second_image"].shape[2:] == (16,) * dimensions
    assert_finite(trainer)


def test_trains_a_transformer():
    arguments = {"trainer_class": MAEContrastPretrainer, "pretraining": SMALL}
    planned = make_trainer(**arguments)
    plan = with_primus(planned.plans_manager.plans) | {"continue_training": False}
    trainer = MAEContrastPretrainer(plan, "3d_fullres", "all", planned.dataset_json, torch.device("cpu"))
    trainer.run_training()
    assert_finite(trainer)


def test_cases_smaller_than_a_crop():
    trainer = run(trainer_class=MAEContrastPretrainer, pretraining=SMALL, shape=(10, 20, 17))
    views = trainer._views(trainer.dataloader_train.batches[0], 0, 0)
    for crop in ("first", "second"):
        assert views[f"{crop}_inside"].sum((1, 2, 3, 4)).tolist() == [10 * 16 * 16] * 2
    assert_finite(trainer)


def test_resume():
    pretraining = {"batch_size": 2, "warmup_epochs": 0, "method": SMALL["method"]}
    assert_resumes_exactly(MAEContrastPretrainer, channels=1, pretraining=pretraining)
