"""The whole road, run once through the installed command: scans in, predictions out."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

from nnssl_plugin.cli.env import search_path
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart import steps as road
from nnssl_plugin.quickstart.commands import environment_for
from nnssl_plugin.quickstart.scans import TEST

pytestmark = pytest.mark.slow

PRETRAINED, SCRATCH = (f"{road.SMALL_PLAN}-{arm}" for arm in road.ARMS)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The quickstart's folder and what it printed."""
    folder = tmp_path_factory.mktemp("road") / "quick start"  # a blank, as in many home folders
    command = [sys.executable, "-m", "nnssl_plugin.cli.main", "quickstart", "-o", str(folder)]
    # not in the repository, whose folder would stand before the installed package
    finished = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return folder, finished.stdout


def nnunet(folder, *command):
    """Run one of nnU-Net's commands on the quickstart's folders."""
    environment = environment_for(folder, search_path())
    finished = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


def pretraining_fold(folder):
    return road.fold_folder(folder)


def test_each_command_is_printed_before_its_result(walked):
    _, printed = walked
    commands = [line for line in printed.splitlines() if line.startswith("$ ") and "export" not in line]
    assert [line.count("nnUNetv2_train") for line in commands].count(1) == 3
    # all but the eval of the environment; the scans and the report are no commands
    assert printed.count("done in") == len(commands) - 1 + 2


def test_the_pretraining_checkpoint_is_plain_and_complete(walked):
    fold = pretraining_fold(walked[0])
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["current_epoch"] == road.SETTINGS["epochs"]
    assert checkpoint["ssl_state"]["step"] == 40
    assert checkpoint["provenance"]["method"] == "med3dinsight"
    assert all(torch.isfinite(v).all() for v in checkpoint["network_weights"].values() if v.is_floating_point())
    assert (fold / "progress.png").stat().st_size > 0
    assert list((fold / "figures").glob("reconstruction_*.png"))


def test_the_plan_shrank_the_network(walked):
    checkpoint = torch.load(pretraining_fold(walked[0]) / "checkpoint_final.pth", weights_only=True)
    widths = [v.shape[0] for k, v in checkpoint["network_weights"].items() if k.startswith("encoder.stages")]
    assert min(widths) == road.FEATURES


def test_the_whole_encoder_was_loaded(walked):
    preprocessed = walked[0] / "nnUNet_preprocessed" / road.TARGET
    report = read_json(preprocessed / f"{PRETRAINED}_{road.CONFIGURATION}_report.json")
    assert report["coverage"]["encoder"] == 1.0
    assert report["coverage"]["decoder"] > 0.9
    assert report["warnings"] == []


def test_adapted_weights_are_those_of_the_checkpoint(walked):
    source = torch.load(pretraining_fold(walked[0]) / "checkpoint_final.pth", weights_only=True)["network_weights"]
    preprocessed = walked[0] / "nnUNet_preprocessed" / road.TARGET
    adapted = torch.load(preprocessed / f"{PRETRAINED}_{road.CONFIGURATION}.pth", weights_only=True)
    trained = [key for key in source if ".seg_layers." not in key]
    assert trained
    assert all(torch.equal(source[key], adapted["network_weights"][key]) for key in trained)


@pytest.mark.parametrize("arm", road.ARMS)
def test_both_arms_were_validated_by_nnunet(walked, arm):
    summary = read_json(road.fold_folder(walked[0], arm) / "validation" / "summary.json")
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    assert set(summary["mean"]) == {"1", "2"}


@pytest.mark.parametrize("arm", road.ARMS)
def test_predictions_lie_on_the_grid_of_their_images(walked, arm):
    folder, _ = walked
    labels = sorted((folder / "nnUNet_raw" / road.TARGET / "labelsTs").iterdir())
    assert len(labels) == TEST
    for label in labels:
        predicted, truth = nibabel.load(folder / "predictions" / arm / label.name), nibabel.load(label)
        assert predicted.shape == truth.shape
        np.testing.assert_allclose(predicted.affine, truth.affine, atol=1e-4)
        assert set(np.unique(predicted.get_fdata())) <= {0, 1, 2}


def test_the_printed_dice_is_that_of_the_predictions(walked):
    folder, printed = walked
    for arm in road.ARMS:
        dice = []
        for label in (folder / "nnUNet_raw" / road.TARGET / "labelsTs").iterdir():
            truth = nibabel.load(label).get_fdata()
            predicted = nibabel.load(folder / "predictions" / arm / label.name).get_fdata()
            for structure in (1, 2):
                overlap = 2 * ((truth == structure) & (predicted == structure)).sum()
                dice.append(overlap / ((truth == structure).sum() + (predicted == structure).sum()))
        assert f"{arm:<10} {np.mean(dice):.3f}" in printed


def test_the_report_shows_the_dice_of_both_arms(walked):
    folder, printed = walked
    report = (folder / "report.html").read_text()
    assert str(folder / "report.html") in printed
    for arm in road.ARMS:
        mean = next(line.split()[1] for line in printed.splitlines() if line.startswith(f"  {arm} "))
        assert f"<td>{mean}</td>" in report
    assert report.count("data:image/png;base64,") == len(list((folder / "report").glob("*.png"))) >= TEST + 6


def test_walking_a_finished_road_again_only_shows_the_numbers(walked):
    folder, printed = walked
    command = [sys.executable, "-m", "nnssl_plugin.cli.main", "quickstart", "-o", str(folder)]
    again = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert again.returncode == 0 and "done already" in again.stdout and "$" not in again.stdout
    assert printed.splitlines()[-5:] == again.stdout.splitlines()[-5:]


def test_nnunet_finds_the_best_configuration_among_the_arms(walked):
    nnunet(
        walked[0],
        "nnUNetv2_find_best_configuration",
        road.TARGET_ID,
        "-p",
        PRETRAINED,
        SCRATCH,
        "-c",
        road.CONFIGURATION,
        "-tr",
        road.FINETUNER,
        "-f",
        "0",
        "--disable_ensembling",
        "-np",
        "1",
    )
    information = read_json(walked[0] / "nnUNet_results" / road.TARGET / "inference_information.json")
    assert information["best_model_or_ensemble"]["selected_model_or_models"][0]["plans_identifier"] in (
        PRETRAINED,
        SCRATCH,
    )
    assert len(information["considered_models"]) == 2


def test_nnunet_ensembles_the_arms(walked):
    folder = walked[0]
    arms = [folder / "predictions" / arm for arm in road.ARMS]
    nnunet(folder, "nnUNetv2_ensemble", "-i", *map(str, arms), "-o", str(folder / "ensemble"), "-np", "1")
    name = next(arms[0].glob("*.npz")).name.replace(".npz", ".nii.gz")
    together = nibabel.load(folder / "ensemble" / name)
    expected = np.mean([np.load(arm / name.replace(".nii.gz", ".npz"))["probabilities"] for arm in arms], 0).argmax(0)
    assert (expected == together.get_fdata().transpose(2, 1, 0)).mean() > 0.99
