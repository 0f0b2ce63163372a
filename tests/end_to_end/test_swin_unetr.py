"""SwinUNETR through the commands: planned from its preset, pretrained, adapted, fine-tuned, and used for prediction.

One channel is pretrained; two channels with one more class are fine-tuned.
"""

import re
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from in_process import command, nnunet_folders, predict
from small_swin import ARGUMENTS

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer

pytestmark = pytest.mark.slow

TRAINER, DATASET_ID, CHANNELS, CASES = "PretrainedSegmentationTrainer", "901", 2, 5
SHAPE = (18, 20, 17)
CLASSES = {"background": 0, "body": 1, "lesion": 2}
LINEAR = {"order": 1, "order_z": 0, "force_separate_z": None}
RESAMPLING = {f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")} | {
    f"resampling_fn_{kind}_kwargs": {"is_seg": kind == "seg", **LINEAR} for kind in ("data", "seg", "probabilities")
}
"""What prediction reads of a plan, as nnU-Net's planner writes it."""
SMALL = [
    f"configurations.3d_fullres.architecture.arch_kwargs.{name}={str(value).lower()}"
    for name, value in ARGUMENTS.items()
]
PRETRAINING = [
    "epochs=2",
    "iterations_per_epoch=2",
    "validation_iterations=1",
    "batch_size=2",
    "lr=0.001",
    "method.queries=4",
    "method.dim=16",
    "method.heads=2",
    "method.layers=1",
    "method.mask_block=4",
    "method.slice_bins=8",
]
FINETUNING = ["finetuning.epochs=1", "finetuning.iterations_per_epoch=2", "finetuning.validation_iterations=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of source and target, the pretraining's checkpoint, and what fine-tuning and prediction left."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    checkpoint = pretrain(source)
    with nnunet_folders(target):
        write_target(target)
        weights = str(checkpoint)
        assert main(["plan", "-d", DATASET_ID, "-n", "like", "--like", weights, "--set", *FINETUNING]) == 0
        assert main(["adapt", "-d", DATASET_ID, "-w", weights, "-p", "like", "-n", "pre"]) == 0
    printed = command(
        target, "nnUNetv2_train", DATASET_ID, "3d_fullres", "0", "-p", "like-pre", "-tr", TRAINER, "-device", "cpu"
    )
    predict(target, target / "images", target / "predictions", dataset=DATASET_ID, plan="like-pre")
    return SimpleNamespace(source=source, target=target, checkpoint=checkpoint, printed=printed)


def pretrain(root):
    """Two epochs of Med3DInsight on one channel, with the plan of the preset."""
    with nnunet_folders(root) as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        write_fake_dataset(cases=4)
        assert (
            main(
                [
                    "plan",
                    "-d",
                    DATASET_ID,
                    "-n",
                    "swin",
                    "--preset",
                    "swinunetr-b",
                    "med3dinsight",
                    "--set",
                    *SMALL,
                    *PRETRAINING,
                ]
            )
            == 0
        )
        preprocessed = root / "nnUNet_preprocessed" / NAME
        plan = read_json(preprocessed / "swin.json") | {"continue_training": False}
        trainer = Med3DInsightPretrainer(
            plan, "3d_fullres", "all", read_json(preprocessed / "dataset.json"), torch.device("cpu")
        )
        trainer.run_training()
    return root / "nnUNet_results" / NAME / "Med3DInsightPretrainer__swin__3d_fullres/fold_all/checkpoint_final.pth"


def write_target(root):
    """The preprocessed cases with two channels, their labels for nnU-Net's validation, and an image to predict."""
    plan = write_fake_dataset(cases=CASES, channels=CHANNELS)
    preprocessed = root / "nnUNet_preprocessed" / NAME
    plan["configurations"]["3d_fullres"] |= RESAMPLING | {
        "normalization_schemes": ["ZScoreNormalization"] * CHANNELS,
        "use_mask_for_norm": [False] * CHANNELS,
    }
    plan["foreground_intensity_properties_per_channel"] = {str(channel): {} for channel in range(CHANNELS)}
    write_json(preprocessed / "nnUNetPlans.json", plan)
    write_json(preprocessed / "dataset.json", read_json(preprocessed / "dataset.json") | {"labels": CLASSES})
    body = np.zeros(SHAPE, np.uint8)
    body[5:12, 6:14, 4:12] = 1
    for case in range(CASES):
        write_image(preprocessed / "gt_segmentations" / f"case_{case:02d}.nii.gz", body)
    for channel in range(CHANNELS):
        noise = np.random.default_rng(channel).normal(size=SHAPE)
        write_image(root / "images" / f"new_{channel:04d}.nii.gz", (3 * body + noise).astype(np.float32))


def write_image(path, values_zyx):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values_zyx.T, np.eye(4)), path)


def weights_of(path):
    return torch.load(path, weights_only=True)["network_weights"]


def test_the_pretraining_trained_the_whole_network_but_its_head(finished):
    content = torch.load(finished.checkpoint, weights_only=True)
    assert content["current_epoch"] == 2 and content["ssl_state"]["step"] == 4
    provenance = content["provenance"]
    assert provenance["network"]["class"] == "nnssl_plugin.networks.swin_unetr.SwinUNETR"
    assert {"swinViT.", "encoder1.", "decoder1."} <= set(provenance["trained"]) and "out." not in provenance["trained"]
    assert content["nnssl_adaptation_plan"]["key_to_encoder"] == "swinViT"
    assert provenance["patch_size"] == [64, 32, 32]
    values = content["network_weights"].values()
    assert all(torch.isfinite(value).all() for value in values if value.is_floating_point())


def test_everything_trained_reaches_two_channels_and_three_classes(finished):
    preprocessed = finished.target / "nnUNet_preprocessed" / NAME
    report = read_json(preprocessed / "like-pre_3d_fullres_report.json")
    assert report["coverage"] == {"encoder": 1.0, "decoder": 1.0, "head": 0.0}
    source, adapted = weights_of(finished.checkpoint), weights_of(preprocessed / "like-pre_3d_fullres.pth")
    stem, head = "swinViT.patch_embed.proj.weight", "out.conv.conv.weight"
    torch.testing.assert_close(adapted[stem].sum(1), source[stem].sum(1))
    assert adapted[stem].shape[1] == CHANNELS and adapted[head].shape[0] == len(CLASSES)
    assert all(torch.equal(adapted[key], source[key]) for key in source if key.startswith("swinViT.layers"))


def test_it_was_fine_tuned_and_validated(finished):
    assert re.search(r"encoder\s+[\d,]+\s+[\d,]+\s+100\.0%", finished.printed)
    fold = finished.target / "nnUNet_results" / NAME / f"{TRAINER}__like-pre__3d_fullres" / "fold_0"
    adapted = weights_of(finished.target / "nnUNet_preprocessed" / NAME / "like-pre_3d_fullres.pth")
    tuned = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    moved = [key for key in tuned if not torch.equal(tuned[key], adapted[key])]
    assert any(key.startswith("swinViT.layers1.") for key in moved) and "out.conv.conv.weight" in moved
    assert all(torch.isfinite(value).all() for value in tuned.values() if value.is_floating_point())
    assert (fold / "validation" / "summary.json").is_file()


def test_the_prediction_lies_on_the_grid_of_its_image(finished):
    prediction = nibabel.load(finished.target / "predictions" / "new.nii.gz")
    image = nibabel.load(finished.target / "images" / "new_0000.nii.gz")
    assert prediction.shape == image.shape and set(np.unique(prediction.get_fdata())) <= set(CLASSES.values())
    np.testing.assert_allclose(prediction.affine, image.affine)
