"""BrainMVPPretrainer on planned networks: templates in checkpoints, resume, chunks, missing modalities, the log."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME
from method_checks import assert_resumes_exactly
from pretraining_harness import assert_same, make_trainer, run

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray, as_state, read_spatial_arrays, resampled
from nnssl_plugin.io.files import write_json
from nnssl_plugin.methods.brainmvp.trainer import BrainMVPPretrainer, cost_of_templates
from nnssl_plugin.pretraining.passes import backward
from nnssl_plugin.transforms.placement import on_case

SMALL = {"epochs": 1, "iterations_per_epoch": 3, "validation_iterations": 1, "batch_size": 2}
NUMBERS = ("train/distillation", "train/cross_modal", "train/contrast", "diagnostics/template_error")


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def arguments(more=(), **method):
    return {
        "trainer_class": BrainMVPPretrainer,
        "channels": 3,
        "pretraining": SMALL | dict(more) | {"method": method},
    }


def lacking(channels: dict[str, list[int]]):
    """Say of cases of the fake dataset which channels they have."""
    folder = Path(os.environ["nnUNet_raw"], NAME)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "modalities.json", channels)


def assert_finite(trainer):
    history = trainer.log.history()
    for name in NUMBERS:
        assert np.isfinite(history[name]).all(), name
    assert history["skipped_steps"] == [0.0]


@pytest.mark.parametrize("residual", [False, True])
def test_trains_encoder_decoder_and_templates_of_the_size_of_the_largest_case(residual):
    trainer = run(**arguments(), residual=residual)
    assert trainer.task.templates.shape == (3, 18, 20, 17)
    assert torch.count_nonzero(trainer.task.templates) > 0 and trainer.task.backbone.input_channels == 1
    assert_finite(trainer)


def test_the_checkpoint_declares_the_templates_and_stores_them_once():
    trainer = run(**arguments())
    path = Path(trainer.output_folder, "checkpoint_final.pth")
    array = read_spatial_arrays(path)["templates"]
    assert torch.equal(array.values, trainer.task.templates)
    assert array.names == ("MR_0", "MR_1", "MR_2") and array.axes == ("IS", "PA", "LR")
    assert array.spacing_mm == (1.0, 1.0, 1.0) and array.normalisation == ("ZScoreNormalization",) * 3
    state = torch.load(path, weights_only=True)["ssl_state"]
    assert state["task"]["templates"].data_ptr() == state["spatial_arrays"]["templates"]["values"].data_ptr()


def test_absent_modalities_are_never_shown_and_their_templates_stay_zero(monkeypatch):
    lacking({f"case_{case:02d}": [0, 1] if case % 2 else [1] for case in range(6)})
    lines = []
    monkeypatch.setattr(BrainMVPPretrainer, "print_to_log_file", lambda self, *words, **named: lines.append(words[0]))
    trainer = run(**arguments())
    assert torch.count_nonzero(trainer.task.templates[2]) == 0
    assert torch.count_nonzero(trainer.task.templates[1]) > 0
    assert_finite(trainer)
    said = "\n".join(map(str, lines))
    assert "no training case has MR_2" in said and "3 of 6 cases have one channel" in said
    assert "Templates: 3 x 18 x 20 x 17 voxels" in said


def test_a_pretraining_that_goes_on_takes_the_templates_up_on_its_own_grid():
    first = run(**arguments())
    content = read_checkpoint(Path(first.output_folder, "checkpoint_final.pth"))
    values = torch.randn(2, 9, 25, 17, generator=torch.Generator().manual_seed(1))
    array = SpatialArray(values, ("other", "mr_1"), (2.0, 1.0, 1.0), ("IS", "PA", "LR"), ("ZScoreNormalization",) * 2)
    source = {key: content[key] for key in ("network_weights", "provenance")} | as_state({"templates": array})
    save_checkpoint(source, Path(first.preprocessed_dataset_folder_base, "first.pth"))
    second = make_trainer(**arguments({"weights": "first.pth"}))
    second.on_train_start()
    second.on_train_end()
    assert_same(second.task.backbone.network.state_dict(), first.task.backbone.network.state_dict())
    fitted = resampled(array, spacing_mm=(1.0, 1.0, 1.0), axes=("IS", "PA", "LR"))
    assert torch.equal(second.task.templates[1], on_case(fitted.values[1], (18, 20, 17)))
    assert torch.count_nonzero(second.task.templates[[0, 2]]) == 0
    assert "array templates carried: other, mr_1: 18 × 25 × 17 voxels" in Path(second.log_file).read_text()


def test_a_virtual_batch_gives_templates_the_gradient_of_the_whole():
    gradients = []
    for chunk in (None, 1):
        trainer = make_trainer(**arguments({"chunk_size": chunk, "batch_size": 3}, contrast_from=0.0))
        trainer.on_train_start()
        views = trainer._views(next(trainer.dataloader_train), 0, 0)
        backward(trainer, views, 0.5)
        gradients.append({n: p.grad for n, p in trainer.task.named_parameters() if p.grad is not None})
        trainer.on_train_end()
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_a_chosen_size_and_a_scaled_view():
    trainer = run(**arguments(template_size=[8, 30, 9], template_view="minmax", masking="grid", features="pooled"))
    assert trainer.task.templates.shape == (3, 8, 30, 9)
    seen = trainer.spatial_arrays()["templates"].values
    assert seen.min() == 0 and seen.max() <= 1
    assert_finite(trainer)


def test_the_template_rate_is_the_plan_s_and_follows_its_schedule():
    trainer = make_trainer(**arguments({"lr": 1e-3}, template_lr=5e-3))
    trainer.initialize()
    own, templates = trainer.optimizer.param_groups[0], trainer.optimizer.param_groups[-1]
    for step in (0, 2):
        trainer.lr_scheduler.step(step)
        assert templates["lr"] == pytest.approx(5 * own["lr"]) and templates["weight_decay"] == 0
    assert own["weight_decay"] == 1e-5


def test_the_log_tells_what_templates_cost():
    assert "8 x 240 x 240 x 155 voxels, 272 MiB" in cost_of_templates(torch.Size((8, 240, 240, 155)))


@pytest.mark.parametrize("available", [None, {"case_00": [0], "case_03": [1, 2]}])
def test_resume(available):
    if available:
        lacking(available)
    settings = {"batch_size": 2, "method": {"contrast_from": 0.4, "template_warmup": 0.2}}
    assert_resumes_exactly(BrainMVPPretrainer, channels=3, pretraining=settings)
