"""Pretraining that starts from weights: loaded once, into every copy, with a report and a chain of origins."""

import os
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from pretraining_harness import assert_same, make_trainer, run, state_of
from small_primus import with_primus
from toy_method import ToyPretrainer

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network, weights_hash
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.pretraining.initial_weights import REPORT

TWO_CHANNELS = {"channel_names": {"0": "MR", "1": "MR"}, "labels": {"background": 0, "body": 1}}
MED3D = {"queries": 4, "dim": 16, "heads": 2, "layers": 1, "mask_block": 4, "slice_bins": 8}


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **options: None)


def preprocessed() -> Path:
    return Path(os.environ["nnUNet_preprocessed"], NAME)


def write_source(file="source.pth", plan=None, **said):
    """A checkpoint beside the plan, with a provenance that says more; returns its weights."""
    torch.manual_seed(99)
    plan = plan or fake_plan()
    weights = build_network(plan, "3d_fullres", TWO_CHANNELS).state_dict()
    provenance = {"network": describe_network(plan, "3d_fullres"), **said}
    preprocessed().mkdir(parents=True, exist_ok=True)
    save_checkpoint({"network_weights": weights, "provenance": provenance}, preprocessed() / file)
    return weights


def started(**pretraining):
    trainer = make_trainer(pretraining={"epochs": 1, **pretraining})
    trainer.on_train_start()
    trainer.interruption.release()
    return trainer


def encoder_equals(network, weights) -> bool:
    return all(
        torch.equal(value, weights[key]) for key, value in network.state_dict().items() if key.startswith("encoder.")
    )


def test_a_fresh_start_takes_the_weights_into_student_and_teacher():
    weights = write_source()
    trainer = started(weights="source.pth")
    assert encoder_equals(trainer.task.backbone.network, weights)
    assert encoder_equals(trainer.task.teacher.network, weights)
    log = Path(trainer.log_file).read_text()
    assert "Pretraining goes on from" in log and "100.0%" in log
    assert read_json(Path(trainer.output_folder, REPORT))["coverage"]["encoder"] == 1.0
    assert not encoder_equals(started().task.backbone.network, weights)


def test_the_new_checkpoint_names_its_origin_and_the_chain():
    told = {
        "method": "supervised, nnUNetTrainer",
        "licence": "CC-BY-4.0",
        "citations": ["Somebody et al."],
        "trained": ["encoder.", "decoder.encoder.", "decoder.stages."],
    }
    weights = write_source(**told)
    first = Path(run(pretraining={"epochs": 1, "weights": "source.pth"}).output_folder, "checkpoint_final.pth")
    provenance = read_checkpoint(first)["provenance"]
    origin = provenance["continued_from"]
    assert origin["checkpoint"] == "source.pth" and origin["weights_sha256"] == weights_hash(weights)
    assert all(origin[key] == told[key] for key in ("method", "licence", "citations"))
    assert provenance["method"] == "toy"
    assert "decoder.stages." in provenance["trained"] and "decoder.transpconvs." not in provenance["trained"]
    first.rename(preprocessed() / "first.pth")
    second = run(pretraining={"epochs": 1, "weights": "first.pth", "seed": 2})
    chain = read_checkpoint(Path(second.output_folder, "checkpoint_final.pth"))["provenance"]["continued_from"]
    assert chain["method"] == "toy" and chain["continued_from"]["method"] == told["method"]


def test_a_resume_loads_nothing_and_is_exact():
    write_source()
    block = {"epochs": 2, "weights": "source.pth"}
    reference = run(pretraining=block)
    trainer = make_trainer(pretraining=block)
    step = trainer.train_step

    def stopping(batch):
        if trainer.step == 6:
            trainer.interruption.reason = "test"
        return step(batch)

    trainer.train_step = stopping
    with pytest.raises(SystemExit):
        trainer.run_training()
    (preprocessed() / "source.pth").unlink()
    resumed = make_trainer(pretraining=block, resume="checkpoint_latest.pth")
    resumed.run_training()
    assert_same(state_of(reference), state_of(resumed))
    assert resumed.continued_from == reference.continued_from


def test_going_on_where_nothing_was_saved_still_loads():
    """``--c`` without a checkpoint is a fresh start for nnU-Net, and so here."""
    weights = write_source()
    plan = write_fake_dataset(channels=2, pretraining={"epochs": 1, "weights": "source.pth"})
    plan["continue_training"] = True
    dataset_json = read_json(preprocessed() / "dataset.json")
    trainer = ToyPretrainer(plan, "3d_fullres", "all", dataset_json, torch.device("cpu"))
    trainer.on_train_start()
    trainer.interruption.release()
    assert encoder_equals(trainer.task.backbone.network, weights)


def test_missing_weights_and_other_architectures_are_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"gone\.pth that plan nnUNetPlans starts from are not there"):
        started(weights="gone.pth")
    write_source("primus.pth", with_primus(fake_plan()))
    with pytest.raises(UserError, match="of the encoder's parameters come from the checkpoint"):
        started(weights="primus.pth")
    with pytest.raises(UserError, match="expected a file name or null"):
        make_trainer(pretraining={"weights": 3})


def test_med3dinsight_pretrains_primus_from_primus():
    plan = with_primus(fake_plan())
    weights = write_source("primus.pth", plan)
    block = {
        "epochs": 1,
        "iterations_per_epoch": 2,
        "validation_iterations": 1,
        "batch_size": 2,
        "method": MED3D,
        "weights": "primus.pth",
    }
    write_fake_dataset(channels=2)
    plan |= {"pretraining": block, "continue_training": False}
    trainer = Med3DInsightPretrainer(
        plan, "3d_fullres", "all", read_json(preprocessed() / "dataset.json"), torch.device("cpu")
    )
    trainer.on_train_start()
    network = trainer.task.backbone.network
    assert all(torch.equal(network.state_dict()[key], weights[key]) for key in weights if key.startswith("eva."))
    trainer.interruption.release()
    trainer.run_training()
    after = network.state_dict()
    still = {key for key in weights if torch.equal(after[key], weights[key].to(after[key].dtype))}
    assert not any(key.startswith(("eva.blocks", "down_projection.")) and after[key].dim() > 1 for key in still)
    checkpoint = read_checkpoint(Path(trainer.output_folder, "checkpoint_final.pth"))
    assert checkpoint["network_weights"].keys() == weights.keys()
    assert checkpoint["provenance"]["trained"][:2] == ["down_projection.", "eva."]
    assert checkpoint["nnssl_adaptation_plan"]["key_to_lpe"] == "eva.pos_embed"
    assert all(torch.isfinite(value).all() for value in after.values())
