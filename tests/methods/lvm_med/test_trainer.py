"""LVMMedPretrainer on planned networks: what is trained and logged, channels, several datasets, chunks, resume."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from method_checks import assert_resumes_exactly
from pretraining_harness import assert_same, make_trainer, run, state_of
from small_planar import NETWORKS, with_planar

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
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


PICTURES = "Dataset903_Pictures"
SOURCES = [
    {"dataset": "901", "configuration": "2d", "kind": "scan"},
    {"dataset": PICTURES, "configuration": "2d", "kind": "picture", "weight": 3, "batch_size": 5},
]


def both_sources(*, resume=None):
    """A trainer on slices of volumes of one channel and on three times as many colour pictures of another size."""
    plan = write_fake_dataset(name=PICTURES, channels=3, dimensions=2, shape=(1, 24, 20), cases=5)
    plan["configurations"]["2d"] |= {"patch_size": [12, 20], "spacing": [0.5, 0.5]}
    write_json(Path(os.environ["nnUNet_preprocessed"], PICTURES, "nnUNetPlans.json"), plan)
    more = {"sources": SOURCES, "iterations_per_epoch": 8, "validation_iterations": 1}
    return make_trainer(**arguments(more, channels=3, image_share=(0.85, 0.95)), channels=1, resume=resume)


def test_pictures_and_slices_of_volumes_are_drawn_by_their_weights():
    trainer = both_sources()
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    drawn = [next(loader) for _ in range(8)]
    shapes = {"scan": (4, 1, 16, 16), "picture": (5, 3, 12, 20)}
    assert all(batch["image"].shape == shapes[batch["kind"]] for batch in drawn)
    assert sorted(batch["kind"] for batch in drawn) == ["picture"] * 6 + ["scan"] * 2


def test_one_network_learns_from_both_and_goes_on_after_a_stop_bit_for_bit():
    trainer = both_sources()
    trainer.run_training()
    history = trainer.log.history()
    assert trainer.task.backbone.input_channels == 3 and history["skipped_steps"] == [0.0]
    for name in ("train/matching", "val/matching", "diagnostics/matching_accuracy"):
        assert all(np.isfinite(history[f"{name}/{kind}"]).all() for kind in ("scan", "picture")), name
    stopped = both_sources()
    stopped.interruption.requested = lambda: stopped.step == 5
    with pytest.raises(SystemExit):
        stopped.run_training()
    resumed = both_sources(resume="checkpoint_latest.pth")
    resumed.run_training()
    assert_same(state_of(trainer), state_of(resumed))


def test_a_virtual_batch_has_the_graphs_of_the_whole():
    assert_finite(run(**arguments({"batch_size": 8, "chunk_size": 3})))


def test_images_outside_of_all_graphs_are_told_and_a_single_image_is_refused():
    trainer = run(**arguments({"batch_size": 6}))
    (log,) = Path(trainer.output_folder).glob("training_log*.txt")
    assert "2 of the 6 images of a batch belong to no graph of 4" in log.read_text()
    with pytest.raises(UserError, match="batch of 1 image makes no graph"):
        run(**arguments({"batch_size": 1}))


def test_the_smallest_batch_is_a_graph_of_two_nodes():
    trainer = run(**arguments({"batch_size": 2}))
    assert_finite(trainer)
    assert trainer.log.history()["diagnostics/chance"] == [0.5]


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
