"""A dataset in which every case lacks a modality, through the commands: prepare, plan, pretrain, adapt, fine-tune."""

import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from small_unet import narrow

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart.phantoms import write_phantoms

pytestmark = pytest.mark.slow

DATASET, ID, PLAN, CASES = "Dataset905_Modalities", "905", "mae-small", 5
PRETRAINING = ("epochs=1", "iterations_per_epoch=3", "validation_iterations=1", "warmup_epochs=0", "batch_size=2")
FINETUNING = ("finetuning.epochs=1", "finetuning.iterations_per_epoch=2", "finetuning.validation_iterations=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after all commands."""
    root = tmp_path_factory.mktemp("modalities")
    with nnunet_folders(root):
        scans = root / "scans"
        write_phantoms(
            scans, CASES, seed=1, shape=(24, 32, 32), spacing_mm=(3, 2, 2), channels=2, labels_folder=scans / "labels"
        )
        for case in range(CASES):  # MR in cases 0, 2 and 4, CT in cases 1, 3 and 4
            if case < CASES - 1:
                (scans / f"phantom_{case:03d}_{(case + 1) % 2:04d}.nii.gz").unlink()
        words = ["--modalities", "T1=*_0000*", "CT=*_0001*", "--labels", "labels/*", "--keep", "-np", "1"]
        assert main(["prepare", "-i", str(scans), "-d", ID, "-n", "Modalities", *words]) == 0
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        small = narrow(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")
        words = ["--preset", "mae", "--set", small, *PRETRAINING, *FINETUNING]
        assert main(["plan", "-d", ID, "-n", PLAN, *words]) == 0
        train(root, "all", PLAN, "MAEPretrainer")
        weights = root / "nnUNet_results" / DATASET / f"MAEPretrainer__{PLAN}__3d_fullres" / "fold_all"
        assert main(["adapt", "-d", ID, "-w", str(weights / "checkpoint_final.pth"), "-p", PLAN, "-n", "pre"]) == 0
        train(root, "0", f"{PLAN}-pre", "PretrainedSegmentationTrainer")
        yield root


def train(root, fold, plan, trainer):
    command(root, "nnUNetv2_train", ID, "3d_fullres", fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def test_absent_channels_stay_zero_under_a_z_score(folder):
    dataset = nnUNetDatasetBlosc2(str(folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_3d_fullres"))
    present = read_json(folder / "nnUNet_raw" / DATASET / "modalities.json")
    assert sorted(map(tuple, present.values())) == [(0,), (0,), (0, 1), (1,), (1,)]
    for case, channels in present.items():
        image = np.asarray(dataset.load_case(case)[0])
        assert image[0].any() == (0 in channels), case


def test_pretraining_and_fine_tuning_end_with_finite_weights(folder):
    results = folder / "nnUNet_results" / DATASET
    for name in (
        f"MAEPretrainer__{PLAN}__3d_fullres/fold_all",
        f"PretrainedSegmentationTrainer__{PLAN}-pre__3d_fullres/fold_0",
    ):
        weights = torch.load(results / name / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        assert all(torch.isfinite(tensor).all() for tensor in weights["network_weights"].values())
    assert 0 <= read_json(results / name / "validation" / "summary.json")["foreground_mean"]["Dice"] <= 1
