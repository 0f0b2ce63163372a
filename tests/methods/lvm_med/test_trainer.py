"""LVMMedPretrainer on planned networks: what is trained and logged, channels, several datasets, chunks, resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from method_checks import assert_resumes_exactly
from pretraining_harness import make_trainer, run
from small_planar import NETWORKS, with_planar

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.lvm_med.trainer import LVMMedPretrainer

METHOD = {"nodes": 4, "neighbours": 2, "dim": 8, "token_stride": 4}
SMALL = {
    "epochs": 1,
    "iterations_per_epoch": 2,
    "validation_iterations": 2,
    "batch_size": 4,
    "lr": 1e-3,
    "warmup_epochs": 0,
}
NUMBERS = (
    "train/matching",
    "val/matching",
    "diagnostics/matching_accuracy",
    "diagnostics/first_order_accuracy",
    "diagnostics/kept_edges",
    "diagnostics/embedding_std",
    "feature_std",
)


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch, request):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        if name == "draw_progress" or "draws" not in request.node.name:
            monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def arguments(more=(), **method):
    return {
        "trainer_class": LVMMedPretrainer,
        "pretraining": SMALL | dict(more) | {"method": METHOD | method},
        "dimensions": 2,
    }


def assert_finite(trainer):
    history = trainer.log.history()
    for name in NUMBERS:
        assert np.isfinite(history[name]).all(), name
    assert history["skipped_steps"] == [0.0]


@pytest.mark.parametrize("residual, channels, batch_norm", [(False, 1, False), (True, 3, True)])
def test_trains_the_encoder_alone(residual, channels, batch_norm):
    planned = arguments(noise=1.0) | {"channels": channels, "residual": residual, "batch_norm": batch_norm}
    trainer = make_trainer(**planned)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.backbone.network.state_dict().items()}
    trainer.run_training()
    after = trainer.task.backbone.network.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    weights = {k for k in before if "encoder." in k and k.endswith("weight") and before[k].ndim > 1}
    assert weights <= moved and all("encoder." in key for key in moved)
    assert trainer.dataloader_train.batches[0]["image"].shape == (4, channels, 16, 16)
    assert_finite(trainer)


@pytest.mark.parametrize("name", NETWORKS)
def test_trains_the_papers_encoders_on_pictures_of_three_channels(name):
    planned = make_trainer(**arguments(), channels=3)
    plan = with_planar(planned.plans_manager.plans, name) | {"continue_training": False}
    trainer = LVMMedPretrainer(plan, "2d", "all", planned.dataset_json, torch.device("cpu"))
    trainer.run_training()
    assert_finite(trainer)
    assert trainer.running_statistics._layers or name == "SAMUNet"


def test_no_window_lacks_foreground_and_neighbouring_slices_share_a_graph():
    trainer = make_trainer(**arguments(slices_per_case=2))
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    for step in range(2):
        batch = loader.batches[step]
        for first, second in ((0, 1), (2, 3)):
            assert batch["cases"][first] == batch["cases"][second]
            slices = [batch["places"][row].origin[0] for row in (first, second)]
            assert slices[1] - slices[0] == 1
        assert all(5 <= batch["places"][row].origin[0] < 12 for row in (0, 2))  # slices of the labelled body


def test_scans_of_two_channels_train_a_network_of_three():
    trainer = run(**arguments(channels=3), channels=2)
    assert trainer.task.backbone.input_channels == 3
    checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=True)
    assert checkpoint["provenance"]["network_channels"] == 3
    assert checkpoint["provenance"]["trained"] == ["encoder.", "decoder.encoder."]
    assert_finite(trainer)


def test_a_virtual_batch_has_the_graphs_of_the_whole():
    assert_finite(run(**arguments({"batch_size": 8, "chunk_size": 3})))


def test_images_outside_of_all_graphs_are_told_and_a_single_image_is_refused():
    trainer = run(**arguments({"batch_size": 6}))
    (log,) = Path(trainer.output_folder).glob("training_log*.txt")
    assert "2 of the 6 images of a batch belong to no graph of 4" in log.read_text()
    with pytest.raises(UserError, match="batch of 1 image makes no graph"):
        run(**arguments({"batch_size": 1}))


def test_volumes_in_3d_are_refused():
    with pytest.raises(UserError, match="does not support 3D"):
        run(**arguments() | {"dimensions": 3})


def test_draws_matches_and_affinities():
    trainer = run(**arguments())
    for name in ("matches", "affinity"):
        assert Path(trainer.output_folder, "figures", f"{name}_epoch_0000.png").stat().st_size > 2_000
    assert trainer.log.history()["diagnostics/chance"] == [0.25]


def test_resume():
    settings = SMALL | {"method": METHOD | {"noise": 1.0}}
    del settings["epochs"], settings["iterations_per_epoch"], settings["validation_iterations"]
    assert_resumes_exactly(LVMMedPretrainer, channels=1, dimensions=2, pretraining=settings)
