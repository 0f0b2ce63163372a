"""DistillationPretrainer on planned networks: what is trained, kept and said, and a run that goes on."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, fake_plan
from method_checks import assert_resumes_exactly
from pretraining_harness import make_trainer, run
from published_layouts import nnfoundation_cnn, nnfoundation_vit, small_res_enc_l

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network, weights_hash
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.distillation.trainer import DistillationPretrainer
from nnssl_plugin.nnunet.plans import build_network

SMALL = {"epochs": 1, "iterations_per_epoch": 2, "validation_iterations": 2, "batch_size": 2, "warmup_epochs": 0}
METHOD = {"teacher": "teacher.pth", "stride": 4}


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def write_teacher(*, channels=2, dimensions=3, seed=5, **said):
    """A wider residual U-Net beside the plan; returns its weights."""
    torch.manual_seed(seed)
    plan = fake_plan(dimensions=dimensions, residual=True)
    configuration = next(iter(plan["configurations"]))
    plan["configurations"][configuration]["architecture"]["arch_kwargs"]["features_per_stage"] = [6, 12, 24]
    labels = {"channel_names": {str(c): "MR" for c in range(channels)}, "labels": {"background": 0, "body": 1}}
    weights = build_network(plan, configuration, labels).state_dict()
    told = {"network": describe_network(plan, configuration), "normalisation": ["ZScoreNormalization"]}
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint({"network_weights": weights, "provenance": told | said}, folder / "teacher.pth")
    return weights


def arguments(more=(), **method):
    return {
        "trainer_class": DistillationPretrainer,
        "pretraining": SMALL | dict(more) | {"method": METHOD | method},
    }


@pytest.mark.parametrize("residual, channels, dimensions", [(False, 2, 3), (True, 2, 2)])
def test_trains_the_encoder_alone_and_keeps_the_teacher_out_of_its_checkpoint(residual, channels, dimensions):
    weights = write_teacher(channels=channels, dimensions=dimensions)
    trainer = make_trainer(**arguments(), channels=channels, residual=residual, dimensions=dimensions)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.state_dict().items()}
    trainer.run_training()
    moved = {k for k, v in trainer.task.state_dict().items() if not torch.equal(before[k], v)}
    assert any("encoder" in key for key in moved) and "projection.weight" in moved
    assert not any("decoder.stages" in key or "seg_layers" in key for key in moved)
    teacher = trainer.task.teacher.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in teacher.items() if key.startswith("encoder."))
    checkpoint = read_checkpoint(Path(trainer.output_folder, "checkpoint_final.pth"))
    assert set(checkpoint["ssl_state"]["task"]) == {
        key for key in trainer.task.state_dict() if not key.startswith("backbone.network.")
    }
    assert not any("teacher" in key for key in checkpoint["ssl_state"]["task"])
    assert [p for p in checkpoint["provenance"]["trained"] if not p.startswith(("encoder.", "decoder.encoder."))] == []
    history = trainer.log.history()
    for name in ("train/cosine", "val/values", "diagnostics/constant_cosine", "feature_std"):
        assert np.isfinite(history[name]).all(), name


def test_the_checkpoint_says_what_the_teacher_is():
    weights = write_teacher(method="mae", licence="CC-BY-SA-4.0", citations=["Somebody et al."], spacing_mm=[3, 3, 3])
    trainer = run(**arguments())
    teacher = read_checkpoint(Path(trainer.output_folder, "checkpoint_final.pth"))["provenance"]["teacher"]
    assert teacher["weights_sha256"] == weights_hash(weights) and teacher["checkpoint"] == "teacher.pth"
    assert teacher["licence"] == "CC-BY-SA-4.0" and teacher["citations"] == ["Somebody et al."]
    log = Path(trainer.log_file).read_text()
    assert "Teacher: teacher.pth (mae), its map of 24 channels at stride [4, 4, 4]; the student's has 16" in log
    assert "NOTE: voxel spacing differs: [3, 3, 3] in pretraining" in log


def test_in_chunks_and_with_values():
    write_teacher(channels=1)
    trainer = run(**arguments({"chunk_size": 1}, values_weight=1.0, normalisation="zscore"))
    assert trainer.log.history()["skipped_steps"] == [0.0]


def test_resume():
    write_teacher(channels=1)
    pretraining = {"batch_size": 2, "warmup_epochs": 0, "method": METHOD}
    assert_resumes_exactly(DistillationPretrainer, channels=1, pretraining=pretraining)


def test_a_run_does_not_go_on_with_another_teacher():
    write_teacher()
    run(**arguments())
    write_teacher(seed=6)
    with pytest.raises(UserError, match=r"learned from other weights \(\w{64}\) than those of the teacher teacher.pth"):
        make_trainer(**arguments(), resume="checkpoint_final.pth")


def with_patch(size):
    """A plan whose windows have the size of the teacher's."""

    def change(plan, configuration):
        plan["configurations"][configuration]["patch_size"] = [size] * 3
        return plan

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, patch, named",
    [(nnfoundation_cnn, 64, "8 channels at stride [8, 8, 8]"), (nnfoundation_vit, 16, "24 channels")],
)
def test_a_small_network_learns_from_foundation_models_of_published_layouts(file, patch, named, monkeypatch):
    small_res_enc_l(monkeypatch)
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    folder.mkdir(parents=True)
    save_checkpoint(file(), folder / "teacher.pth")
    trainer = run(**arguments(stride=8), channels=1, network=with_patch(patch))
    assert trainer.log.history()["skipped_steps"] == [0.0] and np.isfinite(trainer.log.history()["train/cosine"]).all()
    assert named in Path(trainer.log_file).read_text()
    said = read_checkpoint(Path(trainer.output_folder, "checkpoint_final.pth"))["provenance"]["teacher"]
    assert said["weights_sha256"] == trainer.teacher["weights_sha256"] and "A. Author" in str(said["citations"])


def test_a_plan_without_a_teacher_is_refused():
    with pytest.raises(UserError, match="names no teacher"):
        make_trainer(**arguments(teacher=None)).initialize()
