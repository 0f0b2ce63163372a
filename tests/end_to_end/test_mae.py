"""MAE through nnU-Net's own commands: plan, pretrain, adapt, fine-tune and predict labelled phantoms, in few steps; and
pretraining of a small Primus."""

import nibabel
import numpy as np
import pytest
import torch
from in_process import command

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.quickstart.phantoms import write_phantoms

pytestmark = pytest.mark.slow

DATASET, ID, PLAN, PRIMUS = "Dataset904_Phantoms", "904", "mae-small", "mae-primus"
PRETRAINER, FINETUNER = "MAEPretrainer", "PretrainedSegmentationTrainer"
SHAPE, SPACING_MM = (24, 32, 32), (3, 2, 2)
NETWORK = "configurations.3d_fullres.architecture.arch_kwargs"
PRETRAINING = ("iterations_per_epoch=3", "validation_iterations=1", "warmup_epochs=0", "batch_size=2")
FINETUNING = ("finetuning.epochs=1", "finetuning.iterations_per_epoch=3", "finetuning.validation_iterations=1")
SMALL_PRIMUS = (f"{NETWORK}.embed_dim=24", f"{NETWORK}.eva_depth=2", f"{NETWORK}.eva_numheads=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after all commands."""
    root = tmp_path_factory.mktemp("mae")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        write_dataset(root / "nnUNet_raw" / DATASET)
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        plan(root)
        train(root, "all", PRIMUS, PRETRAINER)
        train(root, "all", PLAN, PRETRAINER)
        weights = fold_of(root, PRETRAINER, PLAN, "all") / "checkpoint_final.pth"
        assert main(["adapt", "-d", ID, "-w", str(weights), "-p", PLAN, "-n", "pre"]) == 0
        train(root, "0", f"{PLAN}-pre", FINETUNER)
        predict(root)
        yield root


def write_dataset(raw):
    """Five labelled cases and one to predict."""
    write_phantoms(raw / "imagesTr", 5, seed=1, shape=SHAPE, spacing_mm=SPACING_MM, labels_folder=raw / "labelsTr")
    write_phantoms(raw / "imagesTs", 1, seed=2, shape=SHAPE, spacing_mm=SPACING_MM)
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "liver": 1, "kidney": 2},
            "numTraining": 5,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "NibabelIOWithReorient",
        },
    )


def plan(root):
    """Plans with the preset of the method and few steps: the planned network, narrow, and a small Primus."""
    planned = read_json(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")["configurations"]["3d_fullres"]
    stages = len(planned["architecture"]["arch_kwargs"]["features_per_stage"])
    narrow = f"{NETWORK}.features_per_stage={[4 * 2**stage for stage in range(stages)]}"
    words = ["plan", "-d", ID, "-n", PLAN, "--preset", "mae", "--set", narrow, "epochs=2", *PRETRAINING, *FINETUNING]
    assert main(words) == 0
    words = ["plan", "-d", ID, "-n", PRIMUS, "--preset", "primus-s", "mae", "--set", *SMALL_PRIMUS, "epochs=1"]
    assert main([*words, *PRETRAINING, "method.ratio=0.8"]) == 0


def train(root, fold, plan, trainer):
    command(root, "nnUNetv2_train", ID, "3d_fullres", fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def predict(root):
    folders = ["-i", str(root / "nnUNet_raw" / DATASET / "imagesTs"), "-o", str(root / "predictions")]
    model = ["-d", ID, "-c", "3d_fullres", "-f", "0", "-tr", FINETUNER, "-p", f"{PLAN}-pre"]
    fast = ["-device", "cpu", "-step_size", "1", "--disable_tta", "-npp", "0", "-nps", "0"]
    command(root, "nnUNetv2_predict", *folders, *model, *fast)


def fold_of(root, trainer, plan, fold):
    return root / "nnUNet_results" / DATASET / f"{trainer}__{plan}__3d_fullres" / f"fold_{fold}"


@pytest.mark.parametrize("plan, steps", [(PLAN, 6), (PRIMUS, 3)])
def test_the_pretraining_leaves_a_plain_checkpoint_numbers_and_a_picture(folder, plan, steps):
    fold = fold_of(folder, PRETRAINER, plan, "all")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == steps and checkpoint["provenance"]["method"] == "mae"
    assert all(torch.isfinite(v).all() for v in checkpoint["network_weights"].values() if v.is_floating_point())
    assert any("mask_token" in key for key in checkpoint["ssl_state"]["task"]) == (plan == PRIMUS)
    quality = read_json(fold / "quality.json")
    for name in ("train/reconstruction", "diagnostics/masked_error", "diagnostics/visible_mean_error"):
        assert np.isfinite(quality[name]), name
    assert [path.name for path in (fold / "figures").iterdir()] == [f"reconstruction_epoch_{steps // 3 - 1:04d}.png"]


def test_encoder_and_decoder_were_loaded(folder):
    report = read_json(folder / "nnUNet_preprocessed" / DATASET / f"{PLAN}-pre_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0 and report["coverage"]["decoder"] > 0.9 and report["warnings"] == []


def test_it_fine_tunes_and_predicts_on_the_grid_of_the_image(folder):
    weights = torch.load(fold_of(folder, FINETUNER, f"{PLAN}-pre", 0) / "checkpoint_final.pth", weights_only=False)
    assert all(torch.isfinite(v).all() for v in weights["network_weights"].values() if v.is_floating_point())
    (predicted,) = (folder / "predictions").glob("*.nii.gz")
    image = nibabel.load(folder / "nnUNet_raw" / DATASET / "imagesTs" / "phantom_000_0000.nii.gz")
    prediction = nibabel.load(predicted)
    assert prediction.shape == image.shape and set(np.unique(prediction.get_fdata())) <= {0, 1, 2}
    np.testing.assert_allclose(prediction.affine, image.affine, atol=1e-4)
