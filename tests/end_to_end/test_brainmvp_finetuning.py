"""Every case lacks another modality, through the commands: prepare, pretrain, adapt, fine-tune, fill, predict."""

import nibabel
import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders
from pretraining_harness import assert_same
from small_unet import narrow

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.format.spatial_arrays import read_spatial_arrays
from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart.phantoms import write_phantoms

pytestmark = pytest.mark.slow

DATASET, ID, PLAN, CASES = "Dataset906_Templates", "906", "brainmvp-small", 5
NAMES = ("T1", "T2", "FLAIR", "PD")
TRAINER = "BrainMVPSegmentationTrainer"
PRETRAINING = ("epochs=1", "iterations_per_epoch=3", "validation_iterations=1", "batch_size=2")
FINETUNING = ("finetuning.epochs=1", "finetuning.iterations_per_epoch=2", "finetuning.validation_iterations=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after all commands; ``images``, ``filled`` and ``predicted`` beside them."""
    root = tmp_path_factory.mktemp("templates")
    with nnunet_folders(root):
        grid = {"shape": (24, 32, 32), "spacing_mm": (3, 2, 2), "channels": 4}
        scans = root / "scans"
        write_phantoms(scans, CASES, seed=1, labels_folder=scans / "labels", **grid)
        for case in range(CASES):
            (scans / f"phantom_{case:03d}_{case % 4:04d}.nii.gz").unlink()
        patterns = [f"{name}=*_{channel:04d}*" for channel, name in enumerate(NAMES)]
        words = ["--modalities", *patterns, "--labels", "labels/*", "--keep", "-np", "1"]
        assert main(["prepare", "-i", str(scans), "-d", ID, "-n", "Templates", *words]) == 0
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        small = narrow(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")
        words = ["--preset", "brainmvp", "--set", small, *PRETRAINING, *FINETUNING]
        assert main(["plan", "-d", ID, "-n", PLAN, *words]) == 0
        train(root, "all", PLAN, "BrainMVPPretrainer")
        weights = str(result(root, f"BrainMVPPretrainer__{PLAN}", "all"))
        assert main(["adapt", "-d", ID, "-w", weights, "-p", PLAN, "-n", "pre"]) == 0
        train(root, "0", f"{PLAN}-pre", TRAINER)

        write_phantoms(root / "images", 2, seed=2, **grid)
        (root / "images" / "phantom_000_0002.nii.gz").unlink()
        weights = str(result(root, f"{TRAINER}__{PLAN}-pre", "0"))
        words = ["-d", ID, "-p", f"{PLAN}-pre", "-w", weights]
        assert main(["fill", "-i", str(root / "images"), "-o", str(root / "filled"), *words]) == 0
        words = ["-d", ID, "-c", "3d_fullres", "-f", "0", "-p", f"{PLAN}-pre", "-tr", TRAINER, "-device", "cpu"]
        folders = ["-i", str(root / "filled"), "-o", str(root / "predicted")]
        command(root, "nnUNetv2_predict", *folders, *words, "-npp", "1", "-nps", "1", "--disable_tta")
        yield root


def train(root, fold, plan, trainer):
    command(root, "nnUNetv2_train", ID, "3d_fullres", fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def result(root, run, fold):
    return root / "nnUNet_results" / DATASET / f"{run}__3d_fullres" / f"fold_{fold}" / "checkpoint_final.pth"


def test_each_case_lacks_a_modality_and_each_modality_is_lacked(folder):
    present = read_json(folder / "nnUNet_raw" / DATASET / "modalities.json")
    assert len(present) == CASES and all(len(channels) == 3 for channels in present.values())
    assert len({tuple(channels) for channels in present.values()}) == len(NAMES)


def test_the_templates_of_the_pretraining_arrive_unchanged(folder):
    learned = read_spatial_arrays(result(folder, f"BrainMVPPretrainer__{PLAN}", "all"))
    arrived = read_spatial_arrays(result(folder, f"{TRAINER}__{PLAN}-pre", "0"))
    assert_same(*({name: vars(array) for name, array in arrays.items()} for arrays in (learned, arrived)))
    assert arrived["templates"].names == NAMES and arrived["templates"].values.any()


def test_the_weights_are_finite_and_the_log_tells_both_losses(folder):
    checkpoint = read_checkpoint(result(folder, f"{TRAINER}__{PLAN}-pre", "0"))
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["network_weights"].values())
    assert np.isfinite(checkpoint["logging"]["consistency"]).all() and len(checkpoint["logging"]["train_losses"]) == 1


def test_what_is_missing_is_filled_in_and_predicted(folder):
    assert read_json(folder / "filled" / "filled.json")["cases"] == {"phantom_000": ["FLAIR"]}
    for case in ("phantom_000", "phantom_001"):
        prediction = nibabel.load(folder / "predicted" / f"{case}.nii.gz")
        assert prediction.shape == (32, 32, 24)
        assert set(np.unique(np.asarray(prediction.dataobj))) <= {0, 1, 2}
