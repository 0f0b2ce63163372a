"""LVM-Med with nnU-Net's own commands on volumes in 2D: plan, pretrain, adapt, fine-tune, predict; slices become
volumes again."""

import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders, predict
from labelled_phantoms import assert_predicted, write_labelled_phantoms
from small_unet import narrow
from torchvision.models import resnet50

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json

pytestmark = pytest.mark.slow
ID, DATASET, PLAN = "504", "Dataset504_Phantoms", "small"
PRETRAINER, FINETUNER = "LVMMedPretrainer", "PretrainedSegmentationTrainer"
SHAPE, SPACING_MM = (28, 40, 36), (1.5, 1.5, 3.0)
SETTINGS = (
    "epochs=2", "iterations_per_epoch=3", "validation_iterations=1", "warmup_epochs=0", "batch_size=8", "lr=1e-3",
    "method.nodes=4", "method.neighbours=2", "method.dim=16", "method.slices_per_case=2",
    "finetuning.epochs=1", "finetuning.iterations_per_epoch=3", "finetuning.validation_iterations=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after all commands."""
    root = tmp_path_factory.mktemp("lvm_med")
    with nnunet_folders(root):
        write_labelled_phantoms(root / "nnUNet_raw" / DATASET, shape=SHAPE, spacing_mm=SPACING_MM)
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "2d", "-npfp", "2", "-np", "2")
        shrink(root)
        train(root, "all", PLAN, PRETRAINER)
        weights = fold_of(root, PRETRAINER, PLAN, "all") / "checkpoint_final.pth"
        assert main(["adapt", "-d", ID, "-w", str(weights), "-p", PLAN, "-n", "pre", "-c", "2d"]) == 0
        train(root, "0", f"{PLAN}-pre", FINETUNER)
        images = root / "nnUNet_raw" / DATASET / "imagesTs"
        predict(root, images, root / "predictions", dataset=ID, plan=f"{PLAN}-pre", configuration="2d")
        yield root


def shrink(root):
    """The plan with the preset of the method, a narrow network and few steps."""
    small = narrow(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json", "2d")
    assert main(["plan", "-d", ID, "-n", PLAN, "--preset", "lvm-med", "--set", small, *SETTINGS]) == 0


def train(root, fold, plan, trainer):
    command(root, "nnUNetv2_train", ID, "2d", fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def fold_of(root, trainer, plan, fold):
    return root / "nnUNet_results" / DATASET / f"{trainer}__{plan}__2d" / f"fold_{fold}"


def test_the_pretraining_leaves_a_plain_checkpoint_numbers_and_pictures(folder):
    fold = fold_of(folder, PRETRAINER, PLAN, "all")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == 6 and checkpoint["provenance"]["method"] == "lvm-med"
    assert all(torch.isfinite(v).all() for v in checkpoint["network_weights"].values() if v.is_floating_point())
    quality = read_json(fold / "quality.json")
    for name in ("train/matching", "diagnostics/matching_accuracy", "diagnostics/kept_edges", "feature_std"):
        assert np.isfinite(quality[name]), name
    assert {path.name for path in (fold / "figures").iterdir()} == {
        f"{name}_epoch_0001.png" for name in ("matches", "affinity")
    }


def test_the_whole_encoder_was_loaded(folder):
    report = read_json(folder / "nnUNet_preprocessed" / DATASET / f"{PLAN}-pre_2d_report.json")
    assert report["coverage"]["encoder"] == 1.0 and report["warnings"] == []


def test_slices_are_predicted_and_merged_to_the_volume(folder):
    assert_predicted(folder / "predictions", folder / "nnUNet_raw" / DATASET)


def test_resnet_50_is_pretrained_fine_tuned_and_exported_for_torchvision(folder):
    planned = ("configurations.2d.patch_size=[64,64]", *SETTINGS, "batch_size=4")
    assert main(["plan", "-d", ID, "-n", "r50", "--preset", "resnet50-unet", "lvm-med", "--set", *planned]) == 0
    train(folder, "all", "r50", PRETRAINER)
    weights = fold_of(folder, PRETRAINER, "r50", "all") / "checkpoint_final.pth"
    assert main(["adapt", "-d", ID, "-w", str(weights), "-p", "r50", "-n", "pre", "-c", "2d"]) == 0
    report = read_json(folder / "nnUNet_preprocessed" / DATASET / "r50-pre_2d_report.json")
    assert report["coverage"]["encoder"] == 1.0
    train(folder, "0", "r50-pre", FINETUNER)
    summary = read_json(fold_of(folder, FINETUNER, "r50-pre", "0") / "validation" / "summary.json")
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    assert main(["export", "-w", str(weights), "-o", str(folder / "r50"), "--format", "torchvision"]) == 0
    encoder = torch.load(folder / "r50" / "encoder.pth", weights_only=True)
    lacking, unknown = resnet50().load_state_dict(encoder, strict=False)
    assert set(lacking) == {"fc.weight", "fc.bias"} and unknown == []
