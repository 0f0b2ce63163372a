"""One screen says what a file is, for every kind of file, and "not stated" where it is silent."""

import json
import math

import numpy as np
import pytest
import torch
from fake_dataset import NAME, fake_plan
from safetensors.torch import save_file

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_pretraining, nnssl_adaptation_plan, nnssl_citations
from nnssl_plugin.checkpoints.format.tensors import parameters_in
from nnssl_plugin.checkpoints.sources.inspection import UNSTATED, WIDTH, inspect_file, screen
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.plans import build_network

DATASET = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}, "numTraining": 12}
LOG = {
    "train_losses": [3.0, 2.0, float("nan")],
    "val_losses": [3.5, 2.5],
    "feature_std": [0.1, 0.73],
    "effective_rank": [4.0, 11.0],
    "skipped_steps": [1.0, 2.0],
}
NAN = {"train_losses": [math.nan], "val_losses": []}


@pytest.fixture
def network():
    return build_network(fake_plan(), "3d_fullres", DATASET)


def own_checkpoint(path, network, *, log=LOG, **changes):
    weights = network.state_dict()
    provenance = describe_pretraining(
        method="toy",
        settings={},
        training={},
        plans=fake_plan(),
        configuration="3d_fullres",
        dataset_json=DATASET,
        trained=["encoder."],
        steps=500,
        cases=4,
        citations=["Somebody: a paper"],
        licence="CC-BY-4.0",
        weights=weights,
    )
    save_checkpoint(
        {
            "network_weights": weights,
            "provenance": provenance | changes,
            "logging": log,
            "current_epoch": 2,
            "trainer_name": "ToyPretrainer",
            "citations": nnssl_citations("toy", ["Somebody: a paper"]),
            "nnssl_adaptation_plan": nnssl_adaptation_plan(fake_plan(), "3d_fullres", network, 1),
            "init_args": {"plans": fake_plan(), "configuration": "3d_fullres", "dataset_json": DATASET},
        },
        path,
    )
    return path


def line(text, label):
    return next(row for row in text.splitlines() if row.startswith(f"{label} "))


def check_screen(text):
    assert len(text.splitlines()) <= 40
    assert all(len(row) <= WIDTH for row in text.splitlines()[2:] if not row.startswith("  "))


def test_a_checkpoint_of_this_package_on_one_screen(network, tmp_path):
    report = inspect_file(own_checkpoint(tmp_path / "own.pth", network))
    text = screen(report)
    check_screen(text)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert f"{parameters:,} parameters" in line(text, "weights")
    assert "PlainConvUNet: features_per_stage [4,8,16], strides [1,2,2]" in line(text, "network")
    assert "1 channels, meaning T1" in line(text, "input") and "ZScoreNormalization" in line(text, "normalisation")
    assert "spacing 1.0, 1.0, 1.0 mm, patch 16, 16, 16 voxels" in line(text, "geometry")
    assert f"{NAME}, 4 cases" in line(text, "trained on") and "500 steps, 2 epochs" in line(text, "trained for")
    assert "encoder.; the rest is as it was initialised" in line(text, "trained")
    health = " ".join(text.split("\nhealth ")[1].split("\nlicence ")[0].split())
    for said in ("0.73", "rank 11", "training loss 2,", "validation loss 2.5", "skipped steps 3"):
        assert said in health
    assert "CC-BY-4.0" in text and "Somebody: a paper" in line(text, "cite")
    assert "are those that the file describes" in line(text, "hash")
    assert f"nnssl_plugin adapt -d TARGET_ID -w {tmp_path / 'own.pth'} -n toy" in text
    assert json.loads(json.dumps(report)) == report


def test_weights_that_were_changed_are_noticed(network, tmp_path):
    report = inspect_file(own_checkpoint(tmp_path / "own.pth", network, weights_sha256="0" * 64))
    assert "ARE NOT THOSE" in report["hash"]


def test_a_log_without_numbers_leaves_health_to_quality_json(network, tmp_path):
    path = own_checkpoint(tmp_path / "own.pth", network, log=NAN)
    assert inspect_file(path)["health"] == {}
    write_json(tmp_path / "quality.json", {"feature_std": 0.5, "val_losses": None, "skipped_steps": 0.0})
    assert inspect_file(path)["health"] == {"feature_std": 0.5, "skipped_steps": 0.0}
    (tmp_path / "quality.json").write_text("{")
    assert inspect_file(path)["health"] == {}


def test_a_stock_checkpoint(network, tmp_path):
    arguments = {"plans": fake_plan(), "configuration": "3d_fullres", "dataset_json": DATASET, "fold": 0}
    log = {"ema_fg_dice": [np.float32(0.5), np.float32(0.87)]}
    torch.save(
        {
            "network_weights": network.state_dict(),
            "init_args": arguments,
            "trainer_name": "nnUNetTrainer",
            "current_epoch": 1000,
            "logging": log,
        },
        tmp_path / "checkpoint_final.pth",
    )
    text = screen(inspect_file(tmp_path / "checkpoint_final.pth"))
    check_screen(text)
    assert "nnU-Net (supervised training), written by nnUNetTrainer" in text and "1000 epochs" in text
    assert "0.87" in line(text, "health") and "12 cases" in line(text, "trained on")
    assert "-n supervised" in text and "-pretrained_weights" in text


def test_an_nnssl_checkpoint(tmp_path):
    plan = {
        "dataset_name": "Dataset745_OpenMind",
        "configurations": {
            "onemmiso": {
                "normalization_schemes": ["ZScoreNormalization"],
                "spacing": [1, 1, 1],
                "patch_size": [160] * 3,
            }
        },
    }
    block = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
        "pretrain_plan": plan,
        "pretrain_num_input_channels": 1,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
    }
    torch.save(
        {
            "network_weights": {"encoder.stem.convs.0.conv.weight": torch.zeros(32, 1, 3, 3, 3)},
            "nnssl_adaptation_plan": block,
            "trainer_name": "BaseMAETrainer",
        },
        tmp_path / "a.pth",
    )
    text = screen(inspect_file(tmp_path / "a.pth"))
    check_screen(text)
    assert "ResidualEncoderUNet: features_per_stage [32,64,128,256,320,320]" in line(text, "network")
    assert "Dataset745_OpenMind, cases not stated" in line(text, "trained on")
    assert "-n nnssl-basemaetrainer" in text and UNSTATED in line(text, "licence")


def test_silent_files_are_said_to_be_silent(tmp_path):
    save_file({f"module.blocks.{i}.weight": torch.zeros(2) for i in range(5)}, tmp_path / "a.safetensors")
    report = inspect_file(tmp_path / "a.safetensors")
    text = screen(report)
    check_screen(text)
    for label in ("method", "network", "input", "normalisation", "geometry", "trained on", "health", "licence", "hash"):
        assert line(text, label).endswith(UNSTATED)
    assert "blocks.0.weight, blocks.1.weight, blocks.2.weight" in line(text, "first keys")
    assert "without 'module.'" in line(text, "read as") and "--mapping TABLE" in text
    assert report["network"] is None and report["parameters"] == 10


def test_a_table_adds_what_it_knows(tmp_path):
    torch.save({"swin_vit.patch_embed.proj.weight": torch.zeros(48, 1, 2, 2, 2)}, tmp_path / "a.pt")
    text = screen(inspect_file(tmp_path / "a.pt", mapping="voco-b"))
    check_screen(text)
    assert "SwinUNETR: feature_size 48" in line(text, "network") and "1 channels, meaning CT" in line(text, "input")
    assert "--mapping voco-b" in text


def test_what_adapt_wrote_says_how_to_train_with_it(network, tmp_path):
    block = {"configuration": "3d_fullres", "weights": "nnUNetPlans-toy_3d_fullres.pth"}
    write_json(tmp_path / "nnUNetPlans-toy.json", {**fake_plan(), "plans_name": "nnUNetPlans-toy", "finetuning": block})
    loaded = [key for key in network.state_dict() if key.startswith("encoder.")]
    save_checkpoint(
        {
            "network_weights": network.state_dict(),
            "adaptation": {"loaded": loaded},
            "provenance": {"method": "toy", "weights_sha256": "0" * 64},
        },
        tmp_path / "nnUNetPlans-toy_3d_fullres.pth",
    )
    report = inspect_file(tmp_path / "nnUNetPlans-toy_3d_fullres.pth")
    text = screen(report)
    check_screen(text)
    assert f"{len(loaded)} tensors came from the pretraining" in line(text, "trained")
    assert "nnUNetv2_train TARGET_ID 3d_fullres 0 -p nnUNetPlans-toy -tr PretrainedSegmentationTrainer" in text
    assert report["hash"] == UNSTATED  # the recorded one is that of the pretraining's weights


def test_long_entries_are_cut_to_the_screen(network, tmp_path):
    changes = {
        "citations": [f"Author {i}: " + "a very long title " * 20 for i in range(9)],
        "channels": [f"channel {i}" for i in range(60)],
        "licence": "x" * 300,
    }
    text = screen(inspect_file(own_checkpoint(tmp_path / "own.pth", network, **changes)))
    check_screen(text)


def test_shared_tensors_are_counted_once():
    weight = torch.zeros(3, 4)
    weights = {"a": weight, "b": weight, "c": torch.ones(2), "index": torch.zeros(5, dtype=torch.long)}
    assert parameters_in(weights) == 12 + 2


def test_nothing_is_built(tmp_path):
    """The class that a file names is text: a module that would run code when it is imported is not imported."""
    (tmp_path / "harmful_module.py").write_text("raise SystemExit('imported')\n")
    provenance = {"network": {"class": "harmful_module.Net", "kwargs": {}}, "trained": None}
    save_checkpoint({"network_weights": {"a": torch.zeros(1)}, "provenance": provenance}, tmp_path / "a.pth")
    report = inspect_file(tmp_path / "a.pth")
    assert report["network"]["class"] == "harmful_module.Net" and line(screen(report), "network").endswith(" Net")


@pytest.mark.parametrize("provenance", [{"network": 3}, {"network": {"class": "a"}}, {"network": {}, "trained": 5}])
def test_a_provenance_of_other_types_is_a_user_error(provenance, tmp_path):
    save_checkpoint({"network_weights": {"a": torch.zeros(1)}, "provenance": provenance}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth"):
        inspect_file(tmp_path / "a.pth")
