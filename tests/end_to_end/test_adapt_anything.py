"""Any pretraining to any dataset, through the commands: PlainConv, ResEnc and Primus.

One channel at 1 mm is pretrained; four channels at 5 × 1 × 1 mm with another number of classes are fine-tuned and
predicted. The same file of weights serves stock nnU-Net, and a network that does not match is refused with the remedy.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from in_process import attempt, command, nnunet_folders, predict, run_with
from labelled_phantoms import assert_predicted, write_labelled_phantoms
from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_1epoch
from small_primus import with_primus

from nnssl_plugin.cli.env import VARIABLE, search_path
from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer
from nnssl_plugin.quickstart.commands import environment_for

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
weight_routes = __import__("weight_routes")
pytestmark = pytest.mark.slow

KINDS = ("plain", "residual", "primus")
UNETS = KINDS[:2]
TARGET, TARGET_ID = "Dataset902_Anisotropic", "902"
SPACING_MM, SHAPE, CHANNELS = (5, 1, 1), (16, 40, 40), ("MR0", "MR1", "MR2", "MR3")
PRETRAINING = {
    "epochs": 1, "iterations_per_epoch": 3, "validation_iterations": 1, "batch_size": 2, "lr": 1e-3,
    "method": {"queries": 4, "dim": 16, "heads": 2, "layers": 1, "mask_block": 4, "slice_bins": 8},
}  # fmt: skip
FINETUNING = ("finetuning.epochs=1", "finetuning.iterations_per_epoch=4", "finetuning.validation_iterations=1")
TRAINER, STOCK = "PretrainedSegmentationTrainer", "nnUNetTrainer_1epoch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders with both datasets, and the checkpoint of a pretraining for each network."""
    root = tmp_path_factory.mktemp("adapt anything")
    with nnunet_folders(root) as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        for kind in KINDS:
            pretrain(root, kind)
        patch.delenv("nnUNet_n_proc_DA")
        write_labelled_phantoms(root / "nnUNet_raw" / TARGET, shape=SHAPE, spacing_mm=SPACING_MM, channels=CHANNELS)
        command(root, "nnUNetv2_plan_and_preprocess", "-d", TARGET_ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        for kind in KINDS:
            adapt(root, kind)
        yield root


def pretrain(root, kind):
    """A few steps of Med3DInsight on isotropic cases of one channel."""
    write_fake_dataset(cases=4, residual=kind == "residual")
    plan = with_primus(fake_plan()) if kind == "primus" else fake_plan(residual=kind == "residual")
    plan |= {"plans_name": kind, "pretraining": PRETRAINING, "continue_training": False}
    dataset_json = read_json(root / "nnUNet_preprocessed" / NAME / "dataset.json")
    Med3DInsightPretrainer(plan, "3d_fullres", "all", dataset_json, torch.device("cpu")).run_training()


def pretrained(root, kind):
    return (
        root
        / "nnUNet_results"
        / NAME
        / f"Med3DInsightPretrainer__{kind}__3d_fullres"
        / "fold_all"
        / "checkpoint_final.pth"
    )


def adapt(root, kind):
    weights = str(pretrained(root, kind))
    assert main(["plan", "-d", TARGET_ID, "-n", kind, "--like", weights, "--set", *FINETUNING]) == 0
    assert main(["adapt", "-d", TARGET_ID, "-w", weights, "-p", kind, "-n", "pre"]) == 0


def train(root, plan, trainer, *more):
    """Fine-tune fold 0 and return its checkpoint and what was printed."""
    printed = command(
        root, "nnUNetv2_train", TARGET_ID, "3d_fullres", "0", "-p", plan, "-tr", trainer, "-device", "cpu", *more
    )
    fold = root / "nnUNet_results" / TARGET / f"{trainer}__{plan}__3d_fullres" / "fold_0"
    return torch.load(fold / "checkpoint_final.pth", weights_only=False), printed


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_encoder_reaches_the_other_dataset(folder, kind):
    preprocessed = folder / "nnUNet_preprocessed" / TARGET
    report = read_json(preprocessed / f"{kind}-pre_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0
    assert any("spacing" in warning for warning in report["warnings"])
    adapted = torch.load(preprocessed / f"{kind}-pre_3d_fullres.pth", weights_only=True)["network_weights"]
    source = torch.load(pretrained(folder, kind), weights_only=True)["network_weights"]
    encoder = "eva.blocks." if kind == "primus" else "encoder.stages.1."
    same = [key for key in source if key.startswith(encoder)]
    assert same and all(torch.equal(adapted[key], source[key]) for key in same)
    stem = {
        "plain": "encoder.stages.0.0.convs.0.conv.weight",
        "residual": "encoder.stem.convs.0.conv.weight",
        "primus": "down_projection.proj.weight",
    }[kind]
    assert adapted[stem].shape[1] == len(CHANNELS) and source[stem].shape[1] == 1
    torch.testing.assert_close(adapted[stem].sum(1, keepdim=True), source[stem])


@pytest.mark.parametrize("kind", KINDS)
def test_it_fine_tunes_and_predicts(folder, kind):
    checkpoint, printed = train(folder, f"{kind}-pre", TRAINER)
    assert re.search(r"encoder\s+[\d,]+\s+[\d,]+\s+100\.0%", printed)
    values = checkpoint["network_weights"].values()
    assert all(torch.isfinite(value).all() for value in values if value.is_floating_point())
    raw, out = folder / "nnUNet_raw" / TARGET, folder / "predictions" / kind
    predict(folder, raw / "imagesTs", out, dataset=TARGET_ID, plan=f"{kind}-pre")
    assert_predicted(out, raw)


@pytest.fixture
def few_stock_steps(monkeypatch):
    """nnU-Net's own trainers have no setting for the length of an epoch."""
    start = nnUNetTrainer_1epoch.on_train_start

    def shorten(trainer):
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 4, 1
        start(trainer)

    monkeypatch.setattr(nnUNetTrainer_1epoch, "on_train_start", shorten)


@pytest.mark.parametrize("kind", UNETS)
def test_stock_nnunet_takes_the_same_file(folder, kind, few_stock_steps):
    weights = folder / "nnUNet_preprocessed" / TARGET / f"{kind}-pre_3d_fullres.pth"
    checkpoint, printed = train(folder, kind, STOCK, "-pretrained_weights", str(weights))
    assert str(weights) in printed
    assert checkpoint["trainer_name"] == STOCK and checkpoint["current_epoch"] == 1


def route_command(_routes, *words):
    """What the benchmark runs in a process of its own."""
    trainers = os.pathsep.join([search_path(), str(weight_routes.STOCK_TRAINER)])
    code, printed = run_with({**os.environ, VARIABLE: trainers, "nnUNet_n_proc_DA": "0"}, words)
    assert code == 0, printed[-6000:]


def test_every_route_brings_the_same_weights_and_losses(folder, monkeypatch):
    environment = environment_for(folder, search_path())
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(weight_routes.Routes, "_command", route_command)
    *rows, scratch = weight_routes.main(
        [
            "-d",
            TARGET_ID,
            "-p",
            "residual",
            "-w",
            str(pretrained(folder, "residual")),
            "-o",
            str(folder / "routes"),
            "--iterations",
            "2",
            "--routes",
            "adapt",
            "import",
            "stock",
            "scratch",
        ]
    )
    assert [row["route"] for row in rows] == ["adapt", "import", "stock"]
    assert rows[0]["adapted_sha256"] == rows[1]["adapted_sha256"]
    assert weight_routes.agree(rows)
    assert scratch["train_loss"] != rows[0]["train_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_network_does_not_match_and_the_remedy_is_named(folder, kind, capsys):
    weights = str(pretrained(folder, kind))
    assert main(["adapt", "-d", TARGET_ID, "-w", weights, "-p", "nnUNetPlans", "-n", kind]) == 2
    said = capsys.readouterr().err
    assert "of the encoder's parameters come from the checkpoint" in said and "nnssl_plugin plan -d" in said
    assert "--like" in said and len(said.splitlines()) <= 10
    assert not list((folder / "nnUNet_preprocessed" / TARGET).glob(f"nnUNetPlans-{kind}*"))


def test_training_with_weights_of_another_network_fails_loudly(folder):
    preprocessed = folder / "nnUNet_preprocessed" / TARGET
    plan = read_json(preprocessed / "plain-pre.json") | {"plans_name": "mixed"}
    plan["configurations"] = read_json(preprocessed / "residual.json")["configurations"]
    write_json(preprocessed / "mixed.json", plan)
    code, printed = attempt(
        folder, "nnUNetv2_train", TARGET_ID, "3d_fullres", "0", "-p", "mixed", "-tr", TRAINER, "-device", "cpu"
    )
    assert code != 0
    assert "were not written for the network of plan mixed" in printed and "nnssl_plugin adapt -d ID" in printed
    fold = folder / "nnUNet_results" / TARGET / f"{TRAINER}__mixed__3d_fullres" / "fold_0"
    assert not (fold / "checkpoint_final.pth").exists()
