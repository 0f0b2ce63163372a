"""Two datasets of other spacings in one pretraining through nnU-Net's own commands, and what becomes of it."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from in_process import attempt, command, nnunet_folders
from labelled_phantoms import write_labelled_phantoms
from small_unet import narrow

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.training import user_errors

pytestmark = pytest.mark.slow

FIRST, SECOND = "Dataset905_Thick", "Dataset906_Thin"
SPACING_MM = {FIRST: (3, 2, 2), SECOND: (2, 1, 1)}
SHAPE = (24, 32, 32)
SOURCES = [{"dataset": "905", "kind": "thick"}, {"dataset": SECOND, "kind": "thin", "weight": 2, "batch_size": 3}]
TRAINING = ("epochs=2", "iterations_per_epoch=4", "validation_iterations=1", "warmup_epochs=0", "batch_size=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after the how-to's commands: both datasets preprocessed, a plan with sources, and its run."""
    root = tmp_path_factory.mktemp("sources")
    with nnunet_folders(root):
        for name, spacing in SPACING_MM.items():
            write_labelled_phantoms(root / "nnUNet_raw" / name, shape=SHAPE, spacing_mm=spacing, licence=name)
        command(root, "nnUNetv2_plan_and_preprocess", "-d", "905", "906", "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        small = narrow(root / "nnUNet_preprocessed" / FIRST / "nnUNetPlans.json")
        words = ["plan", "-d", "905", "-n", "both", "--preset", "mae", "--set", small, *TRAINING]
        assert main([*words, f"sources={json.dumps(SOURCES)}"]) == 0
        yield root


@pytest.fixture(scope="module")
def trained(folder):
    command(
        folder, "nnUNetv2_train", "905", "3d_fullres", "all", "-tr", "MAEPretrainer", "-p", "both", "-device", "cpu"
    )
    return folder / "nnUNet_results" / FIRST / "MAEPretrainer__both__3d_fullres" / "fold_all"


def test_each_kind_has_its_numbers_and_pictures(trained):
    quality = read_json(trained / "quality.json")
    for name in ("train/reconstruction", "val/reconstruction", "diagnostics/masked_error"):
        assert all(np.isfinite(quality[f"{name}/{kind}"]) for kind in ("thick", "thin")), name
    pictures = {path.name for path in (trained / "figures").iterdir()}
    assert {f"reconstruction_{kind}_epoch_0001.png" for kind in ("thick", "thin")} <= pictures
    assert (trained / "progress.png").is_file()


def test_the_checkpoint_names_both_and_their_spacings_and_licences(trained):
    provenance = torch.load(trained / "checkpoint_final.pth", weights_only=True)["provenance"]
    assert provenance["licence"] == [FIRST, SECOND]
    first, second = provenance["data"]
    assert (first["dataset"], second["dataset"], second["weight"], second["batch_size"]) == (FIRST, SECOND, 2, 3)
    assert first["spacing_mm"] != second["spacing_mm"] and first["cases"] == second["cases"] == 5


def test_the_weights_are_adapted_as_ever(trained):
    assert main(["adapt", "-d", "905", "-w", str(trained / "checkpoint_final.pth"), "-p", "both", "-n", "pre"]) == 0
    report = read_json(trained.parents[3] / "nnUNet_preprocessed" / FIRST / "both-pre_3d_fullres_report.json")
    assert report["coverage"]["encoder"] == 1.0 and report["coverage"]["decoder"] > 0.9


def test_prediction_with_them_is_refused_in_words(folder, trained):
    raw, out = folder / "nnUNet_raw" / FIRST / "imagesTr", folder / "predicted"
    model = ["-d", "905", "-c", "3d_fullres", "-f", "all", "-tr", "MAEPretrainer", "-p", "both", "-device", "cpu"]
    code, said = attempt(folder, "nnUNetv2_predict", "-i", str(raw), "-o", str(out), *model)
    assert code != 0 and re.search("UserError: .*not to segment.*nnssl_plugin adapt", said, re.DOTALL), said[-2000:]
    assert isinstance(sys.excepthook, user_errors._Hook)  # which leaves out the traceback that this process prints
