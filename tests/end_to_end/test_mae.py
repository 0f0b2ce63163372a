"""MAE, MAE with aligned contrast, and distillation through nnU-Net's own commands, in few steps on labelled phantoms:
every network is planned, pretrained by both, adapted and fine-tuned, and predicts."""

import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders, predict
from labelled_phantoms import assert_predicted, write_labelled_phantoms
from small_swin import ARGUMENTS

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json

pytestmark = pytest.mark.slow

DATASET, ID = "Dataset904_Phantoms", "904"
TRAINERS = {"mae": "MAEPretrainer", "mae-contrast": "MAEContrastPretrainer"}
FINETUNER, DISTILLER = "PretrainedSegmentationTrainer", "DistillationPretrainer"
SHAPE, SPACING_MM = (24, 32, 32), (3, 2, 2)
NETWORK = "configurations.3d_fullres.architecture.arch_kwargs"
PRETRAINING = ("epochs=1", "iterations_per_epoch=2", "validation_iterations=1", "warmup_epochs=0", "batch_size=2")
FINETUNING = ("finetuning.epochs=1", "finetuning.iterations_per_epoch=2", "finetuning.validation_iterations=1")
PRIMUS = {"embed_dim": 24, "eva_depth": 2, "eva_numheads": 2}
NETWORKS = {
    "plain": ("nnUNetPlans", [], {}),
    "resenc": ("nnUNetResEncUNetMPlans", [], {}),
    "primus": ("nnUNetPlans", ["primus-s"], PRIMUS),
    "swin": ("nnUNetPlans", ["swinunetr-b"], ARGUMENTS),
}
"""Network → the plan that it comes from, its preset, and the arguments that make it small."""
RUNS = [(network, method) for network in NETWORKS for method in TRAINERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders with the dataset planned and preprocessed."""
    root = tmp_path_factory.mktemp("mae")
    with nnunet_folders(root):
        write_labelled_phantoms(root / "nnUNet_raw" / DATASET, shape=SHAPE, spacing_mm=SPACING_MM)
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        command(root, "nnUNetv2_plan_experiment", "-d", ID, "-pl", "nnUNetPlannerResEncM")
        yield root


@pytest.fixture(scope="module")
def pretrained(folder):
    """Every network after all commands, for both methods."""
    images = folder / "nnUNet_raw" / DATASET / "imagesTs"
    for network, method in RUNS:
        plan(folder, network, method)
        train(folder, "all", f"{network}-{method}", TRAINERS[method])
        adapt(folder, f"{network}-{method}", TRAINERS[method])
        name = f"{network}-{method}-pre"
        train(folder, "0", name, FINETUNER)
        predict(folder, images, folder / "predictions" / name, dataset=ID, plan=name)
    return folder


@pytest.fixture(scope="module")
def distilled(pretrained):
    """A narrow network that learned from the wider residual one of MAE."""
    teacher = fold_of(pretrained, TRAINERS["mae"], "resenc-mae", "all") / "checkpoint_final.pth"
    plan(pretrained, "plain", "distillation", f"method.teacher={teacher}", "method.stride=4")
    train(pretrained, "all", "plain-distillation", DISTILLER)
    adapt(pretrained, "plain-distillation", DISTILLER)
    return pretrained


def plan(root, network, method, *more):
    """A plan of a small network for a method; U-Nets become narrow, the residual one less so."""
    planned, presets, arguments = NETWORKS[network]
    if not arguments:
        read = read_json(root / "nnUNet_preprocessed" / DATASET / f"{planned}.json")["configurations"]["3d_fullres"]
        width = {"plain": 4, "resenc": 6}[network]
        stages = len(read["architecture"]["arch_kwargs"]["features_per_stage"])
        arguments = {"features_per_stage": [width * 2**stage for stage in range(stages)]}
        if network == "resenc":
            arguments["n_blocks_per_stage"] = [1] * stages
    small = [f"{NETWORK}.{name}={str(value).lower()}" for name, value in arguments.items()]
    words = [
        "plan",
        "-d",
        ID,
        "-p",
        planned,
        "-n",
        f"{network}-{method}",
        "--preset",
        *presets,
        method,
        "--set",
        *small,
    ]
    contrast = ["method.contrast_from=0", "method.dim=8"] if method == "mae-contrast" else []
    assert main([*words, *PRETRAINING, *FINETUNING, *contrast, *more]) == 0


def train(root, fold, plan, trainer):
    command(root, "nnUNetv2_train", ID, "3d_fullres", fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def adapt(root, plan, trainer):
    weights = fold_of(root, trainer, plan, "all") / "checkpoint_final.pth"
    assert main(["adapt", "-d", ID, "-w", str(weights), "-p", plan, "-n", "pre"]) == 0


def fold_of(root, trainer, plan, fold):
    return root / "nnUNet_results" / DATASET / f"{trainer}__{plan}__3d_fullres" / f"fold_{fold}"


def report_of(root, plan):
    return read_json(root / "nnUNet_preprocessed" / DATASET / f"{plan}-pre_3d_fullres_report.json")


def assert_finite(weights):
    assert all(torch.isfinite(v).all() for v in weights.values() if v.is_floating_point())


@pytest.mark.parametrize("network, method", RUNS)
def test_the_pretraining_leaves_a_plain_checkpoint_numbers_and_a_picture(pretrained, network, method):
    fold = fold_of(pretrained, TRAINERS[method], f"{network}-{method}", "all")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == 2 and checkpoint["provenance"]["method"] == method
    assert_finite(checkpoint["network_weights"])
    own = checkpoint["ssl_state"]["task"]
    assert any("mask_token" in key for key in own) == (network == "primus")
    assert any("projector" in key for key in own) == (method == "mae-contrast")
    quality = read_json(fold / "quality.json")
    contrast = ("train/contrast", "diagnostics/positive_cosine") if method == "mae-contrast" else ()
    for name in ("train/reconstruction", "diagnostics/masked_error", "diagnostics/visible_mean_error", *contrast):
        assert np.isfinite(quality[name]), name
    assert [path.name for path in (fold / "figures").iterdir()] == ["reconstruction_epoch_0000.png"]


@pytest.mark.parametrize("network, method", RUNS)
def test_encoder_and_decoder_were_loaded(pretrained, network, method):
    report = report_of(pretrained, f"{network}-{method}")
    assert report["coverage"]["encoder"] == 1.0 and report["coverage"]["decoder"] > 0.9 and report["warnings"] == []


@pytest.mark.parametrize("network, method", RUNS)
def test_it_fine_tunes_and_predicts_on_the_grid_of_the_image(pretrained, network, method):
    name = f"{network}-{method}-pre"
    checkpoint = fold_of(pretrained, FINETUNER, name, 0) / "checkpoint_final.pth"
    assert_finite(torch.load(checkpoint, weights_only=False)["network_weights"])
    assert_predicted(pretrained / "predictions" / name, pretrained / "nnUNet_raw" / DATASET)


def test_a_student_learns_from_the_wider_network_of_mae_and_is_adapted(distilled):
    fold = fold_of(distilled, DISTILLER, "plain-distillation", "all")
    teacher = fold_of(distilled, TRAINERS["mae"], "resenc-mae", "all") / "checkpoint_final.pth"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    said, taught = checkpoint["provenance"]["teacher"], torch.load(teacher, weights_only=True)["provenance"]
    assert said["method"] == "mae" and said["weights_sha256"] == taught["weights_sha256"]
    assert set(checkpoint["ssl_state"]["task"]) >= {"projection.weight", "projection.bias"}
    quality = read_json(fold / "quality.json")
    assert np.isfinite(quality["train/cosine"]) and np.isfinite(quality["diagnostics/constant_cosine"])
    assert [path.name for path in (fold / "figures").iterdir()] == ["agreement_epoch_0000.png"]
    assert report_of(distilled, "plain-distillation")["coverage"]["encoder"] == 1.0
