"""Med3DInsightPretrainer on planned networks: PlainConv and ResEnc, one and several channels, both fields of view."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pretraining_harness import assert_same, make_trainer, run, state_of

from nnssl_plugin.data.cases import Cases
from nnssl_plugin.data.triplets import EMBEDDINGS_FILE, TRIPLETS_FILE
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer

METHOD = {"queries": 4, "dim": 16, "heads": 2, "layers": 1, "mask_block": 4, "slice_bins": 8}
SMALL = {"epochs": 2, "iterations_per_epoch": 3, "validation_iterations": 2, "batch_size": 3, "lr": 1e-3}


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch, request):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    if "draws" not in request.node.name:
        for name in ("draw_progress", "draw_pictures"):
            monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def arguments(**method):
    return {"trainer_class": Med3DInsightPretrainer, "pretraining": SMALL | {"method": METHOD | method}}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
def test_trains_every_part_but_the_segmentation_layers(residual, channels):
    trainer = make_trainer(**arguments(), channels=channels, residual=residual)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.backbone.network.state_dict().items()}
    trainer.run_training()
    after = trainer.task.backbone.network.state_dict()
    still = {k for k in before if torch.equal(before[k], after[k]) and before[k].numel() > 4}
    assert {k for k in still if ".seg_layers." not in k} == set()
    assert any(".seg_layers." in k for k in still)
    history = trainer.log.history()
    for name in ("train/reconstruction", "train/mpot_image", "train/mpot_text", "diagnostics/retrieval_text"):
        assert np.isfinite(history[name]).all()


@pytest.mark.parametrize("field_of_view, window", [("resize", "whole"), ("window", "slice")])
def test_both_fields_of_view_of_table_vi_g(field_of_view, window):
    trainer = run(**arguments(field_of_view=field_of_view))
    assert trainer.task.needs.window == window
    assert np.isfinite(trainer.log.history()["train_losses"]).all()


@pytest.mark.slow
def test_stopped_and_resumed_equals_one_go():
    reference = state_of(run(**arguments()))
    trainer = make_trainer(**arguments())
    step = trainer.train_step

    def stopping(batch):
        if trainer.step == 3:
            trainer.interruption.reason = "test"
        return step(batch)

    trainer.train_step = stopping
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert trainer.step == 4
    resumed = make_trainer(**arguments(), resume="checkpoint_latest.pth")
    resumed.run_training()
    assert_same(reference, state_of(resumed))


def test_checkpoint_keeps_metric_and_transformer_beside_the_network():
    trainer = run(**arguments())
    checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=True)
    assert checkpoint["ssl_state"]["task"]["metric"].shape == (8, 8)
    assert any(key.startswith("psat.") for key in checkpoint["ssl_state"]["task"])
    trained = ["encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages."]
    assert checkpoint["provenance"]["trained"] == trained
    assert "Med3DInsight" in checkpoint["citations"][0]["apa_citations"][0]


def test_the_log_says_what_is_matched_and_names_the_cases_of_a_skipped_step(monkeypatch):
    load = Cases.load_labelled

    def with_nan(self, case):
        image, segmentation, facts = load(self, case)
        return (image[:] * (np.nan if case == "case_04" else 1)), segmentation, facts

    monkeypatch.setattr(Cases, "load_labelled", with_nan)
    trainer = run(**arguments())
    log = Path(trainer.log_file).read_text()
    assert "Slices and texts: 6 of 6 cases, embedded by test." in log and "have a single slice" in log
    skipped = [line for line in log.splitlines() if "was the first to be skipped" in line]
    history = trainer.log.history()
    assert len(skipped) == sum(number > 0 for number in history["skipped_steps"]) > 0
    assert all("not finite in the image: case_04" in line for line in skipped)
    assert {"diagnostics/retrieval_image_empty", "diagnostics/retrieval_text_other_case"} <= set(history)


@pytest.mark.slow
def test_draws_reconstructions():
    trainer = run(**arguments())
    figure = Path(trainer.output_folder, "figures", "reconstruction_epoch_0001.png")
    assert figure.stat().st_size > 5_000


@pytest.mark.parametrize("file", [TRIPLETS_FILE, EMBEDDINGS_FILE])
def test_missing_captions_name_the_command(file, nnunet_environment):
    trainer = make_trainer(**arguments())
    next(Path(nnunet_environment["nnUNet_raw"]).rglob(file)).unlink()
    with pytest.raises(UserError, match="nnssl_plugin caption"):
        trainer.run_training()


def test_2d_configuration_is_refused_with_a_reason():
    trainer = make_trainer(**arguments(), dimensions=2)
    with pytest.raises(UserError, match="3D"):
        trainer.run_training()


def test_nnunet_finds_the_trainer_by_name():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    assert recursive_find_trainer_class_by_name("Med3DInsightPretrainer") is Med3DInsightPretrainer
