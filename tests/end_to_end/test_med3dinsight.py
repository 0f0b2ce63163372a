"""The quickstart from scans to predictions: every command that it runs, on a shorter schedule than its own.

The first of each command that users know runs as the installed executable; the others run in this process.
"""

import io
import subprocess
import time
from contextlib import redirect_stdout

import nibabel
import numpy as np
import pytest
import torch
from in_process import command, run_with
from labelled_phantoms import assert_on_grid

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart import run, steps
from nnssl_plugin.quickstart.commands import run_step
from nnssl_plugin.quickstart.scans import TEST

pytestmark = pytest.mark.slow

PRETRAINED, SCRATCH = (f"{steps.SMALL_PLAN}-{arm}" for arm in steps.ARMS)
SHORT = {
    "epochs": 2,
    "iterations_per_epoch": 5,
    "finetuning.epochs": 3,
    "finetuning.iterations_per_epoch": 10,
    "finetuning.validation_iterations": 1,
}
EXECUTABLES = ("nnssl_plugin", "nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")


class StepRunner:
    """Runs the first step of each of :data:`EXECUTABLES` as users do, and the others in this process."""

    def __init__(self):
        self.seen = set()

    def __call__(self, step, log, *, environment, say, held=None):
        name = step.command[0]
        if name in EXECUTABLES and name not in self.seen:
            self.seen.add(name)
            run_step(step, log, environment=environment, say=say, held=held)
            return
        code, printed = run_with(environment | dict(step.environment), step.command)
        log.write_text(printed, encoding="utf-8")
        assert code == 0, printed[-6000:]


def quickstart(folder):
    """The command on a folder; what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["quickstart", "-o", str(folder)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The quickstart's folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "quick start"  # a blank, as in many home folders
    runner = StepRunner()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setitem(steps.SETTINGS, name, value)
        patch.setattr(run, "run_step", runner)
        printed = quickstart(folder)
    assert runner.seen == set(EXECUTABLES)
    return folder, printed


def pretraining_fold(folder):
    return steps.fold_folder(folder)


def test_each_command_is_printed_before_its_result(finished):
    _, printed = finished
    commands = [line for line in printed.splitlines() if line.startswith("$ ") and "export" not in line]
    assert [line.count("nnUNetv2_train") for line in commands].count(1) == 3
    # all but the eval of the environment; the scans and the report are no commands
    assert printed.count("done in") == len(commands) - 1 + 2


def test_the_pretraining_checkpoint_is_plain_and_complete(finished):
    fold = pretraining_fold(finished[0])
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["current_epoch"] == SHORT["epochs"]
    assert checkpoint["ssl_state"]["step"] == SHORT["epochs"] * SHORT["iterations_per_epoch"]
    assert checkpoint["provenance"]["method"] == "med3dinsight"
    assert all(torch.isfinite(v).all() for v in checkpoint["network_weights"].values() if v.is_floating_point())
    assert (fold / "progress.png").stat().st_size > 0
    assert list((fold / "figures").glob("reconstruction_*.png"))


def test_the_plan_shrank_the_network(finished):
    checkpoint = torch.load(pretraining_fold(finished[0]) / "checkpoint_final.pth", weights_only=True)
    widths = [v.shape[0] for k, v in checkpoint["network_weights"].items() if k.startswith("encoder.stages")]
    assert min(widths) == steps.FEATURES


def test_the_whole_encoder_was_loaded(finished):
    preprocessed = finished[0] / "nnUNet_preprocessed" / steps.TARGET
    report = read_json(preprocessed / f"{PRETRAINED}_{steps.CONFIGURATION}_report.json")
    assert report["coverage"]["encoder"] == 1.0
    assert report["coverage"]["decoder"] > 0.9
    assert report["warnings"] == []


def test_adapted_weights_are_those_of_the_checkpoint(finished):
    source = torch.load(pretraining_fold(finished[0]) / "checkpoint_final.pth", weights_only=True)["network_weights"]
    preprocessed = finished[0] / "nnUNet_preprocessed" / steps.TARGET
    adapted = torch.load(preprocessed / f"{PRETRAINED}_{steps.CONFIGURATION}.pth", weights_only=True)
    trained = [key for key in source if ".seg_layers." not in key]
    assert trained
    assert all(torch.equal(source[key], adapted["network_weights"][key]) for key in trained)


@pytest.mark.parametrize("arm", steps.ARMS)
def test_both_arms_were_validated_by_nnunet(finished, arm):
    summary = read_json(steps.fold_folder(finished[0], arm) / "validation" / "summary.json")
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    assert set(summary["mean"]) == {"1", "2"}


@pytest.mark.parametrize("arm", steps.ARMS)
def test_predictions_lie_on_the_grid_of_their_images(finished, arm):
    folder, _ = finished
    labels = sorted((folder / "nnUNet_raw" / steps.TARGET / "labelsTs").iterdir())
    assert len(labels) == TEST
    for label in labels:
        assert_on_grid(folder / "predictions" / arm / label.name, label)


def test_the_printed_dice_is_that_of_the_predictions(finished):
    folder, printed = finished
    for arm in steps.ARMS:
        dice = []
        for label in (folder / "nnUNet_raw" / steps.TARGET / "labelsTs").iterdir():
            truth = nibabel.load(label).get_fdata()
            predicted = nibabel.load(folder / "predictions" / arm / label.name).get_fdata()
            for structure in (1, 2):
                overlap = 2 * ((truth == structure) & (predicted == structure)).sum()
                dice.append(overlap / ((truth == structure).sum() + (predicted == structure).sum()))
        assert f"{arm:<10} {np.mean(dice):.3f}" in printed


def test_the_report_shows_the_dice_of_both_arms(finished):
    folder, printed = finished
    report = (folder / "report.html").read_text()
    assert str(folder / "report.html") in printed
    for arm in steps.ARMS:
        mean = next(line.split()[1] for line in printed.splitlines() if line.startswith(f"  {arm} "))
        assert f"<td>{mean}</td>" in report
    assert report.count("data:image/png;base64,") == len(list((folder / "report").glob("*.png"))) >= TEST + 6


def test_a_finished_quickstart_only_shows_the_numbers_again(finished):
    folder, printed = finished
    again = quickstart(folder)
    assert "done already" in again and "$" not in again
    assert printed.splitlines()[-5:] == again.splitlines()[-5:]


def test_nnunet_finds_the_best_configuration_among_the_arms(finished):
    command(
        finished[0],
        "nnUNetv2_find_best_configuration",
        steps.TARGET_ID,
        "-p",
        PRETRAINED,
        SCRATCH,
        "-c",
        steps.CONFIGURATION,
        "-tr",
        steps.FINETUNER,
        "-f",
        "0",
        "--disable_ensembling",
        "-np",
        "1",
    )
    information = read_json(finished[0] / "nnUNet_results" / steps.TARGET / "inference_information.json")
    assert information["best_model_or_ensemble"]["selected_model_or_models"][0]["plans_identifier"] in (
        PRETRAINED,
        SCRATCH,
    )
    assert len(information["considered_models"]) == 2


def test_nnunet_ensembles_the_arms(finished):
    folder = finished[0]
    arms = [folder / "predictions" / arm for arm in steps.ARMS]
    command(folder, "nnUNetv2_ensemble", "-i", *map(str, arms), "-o", str(folder / "ensemble"), "-np", "1")
    name = next(arms[0].glob("*.npz")).name.replace(".npz", ".nii.gz")
    together = nibabel.load(folder / "ensemble" / name)
    expected = np.mean([np.load(arm / name.replace(".nii.gz", ".npz"))["probabilities"] for arm in arms], 0).argmax(0)
    assert (expected == together.get_fdata().transpose(2, 1, 0)).mean() > 0.99


@pytest.mark.nightly
def test_the_quickstart_of_the_users_takes_less_than_ten_minutes(tmp_path):
    # not in the repository, whose folder would stand before the installed package
    start = time.monotonic()
    whole = subprocess.run(
        ["nnssl_plugin", "quickstart"], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr[-3000:]
    assert time.monotonic() - start < 600
    fold = steps.fold_folder(tmp_path / "nnssl_quickstart")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == steps.SETTINGS["epochs"] * steps.SETTINGS["iterations_per_epoch"]
