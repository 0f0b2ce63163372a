"""S2DC through nnU-Net's own commands: plan, pretrain, adapt, fine-tune and predict labelled phantoms, in few steps."""

import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders, predict
from labelled_phantoms import assert_predicted, write_labelled_phantoms
from small_unet import narrow

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json

pytestmark = pytest.mark.slow

DATASET, ID, PLAN = "Dataset903_Phantoms", "903", "s2dc-small"
PRETRAINER, FINETUNER = "S2DCPretrainer", "PretrainedSegmentationTrainer"
SHAPE, SPACING_MM = (24, 32, 32), (3, 2, 2)
SETTINGS = (
    "epochs=2", "iterations_per_epoch=3", "validation_iterations=1", "warmup_epochs=0", "batch_size=2", "lr=1e-3",
    "method.token_stride=4", "method.hidden=32", "method.dim=16", "method.queue=8",
    "finetuning.epochs=1", "finetuning.iterations_per_epoch=3", "finetuning.validation_iterations=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after all commands."""
    root = tmp_path_factory.mktemp("s2dc")
    with nnunet_folders(root):
        write_labelled_phantoms(root / "nnUNet_raw" / DATASET, shape=SHAPE, spacing_mm=SPACING_MM)
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        shrink(root)
        train(root, "all", PLAN, PRETRAINER)
        weights = fold_of(root, PRETRAINER, PLAN, "all") / "checkpoint_final.pth"
        assert main(["adapt", "-d", ID, "-w", str(weights), "-p", PLAN, "-n", "pre"]) == 0
        train(root, "0", f"{PLAN}-pre", FINETUNER)
        images = root / "nnUNet_raw" / DATASET / "imagesTs"
        predict(root, images, root / "predictions", dataset=ID, plan=f"{PLAN}-pre")
        yield root


def shrink(root):
    """The plan with the preset of the method, a narrow network and few steps."""
    small = narrow(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")
    assert main(["plan", "-d", ID, "-n", PLAN, "--preset", "s2dc", "--set", small, *SETTINGS]) == 0


def train(root, fold, plan, trainer):
    command(root, "nnUNetv2_train", ID, "3d_fullres", fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def fold_of(root, trainer, plan, fold):
    return root / "nnUNet_results" / DATASET / f"{trainer}__{plan}__3d_fullres" / f"fold_{fold}"


def test_the_pretraining_leaves_a_plain_checkpoint_numbers_and_pictures(folder):
    fold = fold_of(folder, PRETRAINER, PLAN, "all")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == 6 and checkpoint["provenance"]["method"] == "s2dc"
    assert all(torch.isfinite(v).all() for v in checkpoint["network_weights"].values() if v.is_floating_point())
    quality = read_json(fold / "quality.json")
    for name in (
        "train/global",
        "train/p2p",
        "train/p2s",
        "diagnostics/matching_accuracy",
        "diagnostics/cosine_gap",
        "diagnostics/silhouette",
    ):
        assert np.isfinite(quality[name]), name
    assert {path.name for path in (fold / "figures").iterdir()} == {
        f"{name}_epoch_0001.png" for name in ("views", "similarity", "components")
    }


def test_the_whole_encoder_was_loaded(folder):
    report = read_json(folder / "nnUNet_preprocessed" / DATASET / f"{PLAN}-pre_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0 and report["warnings"] == []


def test_it_fine_tunes_and_predicts_on_the_grid_of_the_image(folder):
    weights = torch.load(fold_of(folder, FINETUNER, f"{PLAN}-pre", 0) / "checkpoint_final.pth", weights_only=False)
    assert all(torch.isfinite(v).all() for v in weights["network_weights"].values() if v.is_floating_point())
    assert_predicted(folder / "predictions", folder / "nnUNet_raw" / DATASET)
