"""A fine-tuned model under the name of nnU-Net's trainer: its files, its zip, and the same predictions."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, fake_plan
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing import model_import

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.sharing.stock import export_stock
from nnssl_plugin.cli.env import VARIABLE
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

STOCK = "nnUNetTrainer__nnUNetPlans-med3d__3d_fullres"
DATASET_JSON = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}
SECRETS = {"dataset": {"Doe_Jane": {"images": ["/srv/Doe_Jane.nii.gz"]}}, "description": "scans of Doe_Jane"}


def finetuned_plan() -> dict:
    block = {"weights": "x.pth", "configuration": "3d_fullres", "source": {"checkpoint": "checkpoint_final.pth"}}
    return fake_plan() | {"plans_name": "nnUNetPlans-med3d", "finetuning": block}


def write_model(root: Path, folds=(0, 1), **changes) -> Path:
    """A model folder as PretrainedSegmentationTrainer leaves it, with random weights that differ per fold."""
    model = root / NAME / "PretrainedSegmentationTrainer__nnUNetPlans-med3d__3d_fullres"
    plans = finetuned_plan()
    write_json(model / "plans.json", plans)
    write_json(model / "dataset.json", DATASET_JSON | SECRETS)
    write_json(model / "dataset_fingerprint.json", {"spacings": [[1, 1, 1]]})
    for fold in folds:
        torch.manual_seed(fold)
        content = {
            "network_weights": build_network(plans, "3d_fullres", DATASET_JSON).state_dict(),
            "optimizer_state": {"lr": 0.1},
            "logging": {"mean": np.float64(0.5)},
            "current_epoch": 3,
            "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": fold, "dataset_json": DATASET_JSON},
            "trainer_name": "PretrainedSegmentationTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        (model / f"fold_{fold}").mkdir()
        torch.save(content | changes, model / f"fold_{fold}" / "checkpoint_final.pth")
    return model


def test_every_fold_goes_under_nnunets_own_trainer(tmp_path):
    model = write_model(tmp_path / "results")
    stock = export_stock(model, tmp_path / "stock")
    assert stock.folder == tmp_path / "stock" / NAME / STOCK and stock.folds == ("fold_0", "fold_1")
    for fold in stock.folds:
        before, after = (read_checkpoint(folder / fold / "checkpoint_final.pth") for folder in (model, stock.folder))
        assert after["trainer_name"] == "nnUNetTrainer" and "optimizer_state" not in after
        assert after["inference_allowed_mirroring_axes"] == (0, 1, 2)
        assert list(before["network_weights"]) == list(after["network_weights"])
        assert all(torch.equal(v, after["network_weights"][k]) for k, v in before["network_weights"].items())
    plans = read_json(stock.folder / "plans.json")
    assert "finetuning" not in plans and plans["configurations"] == finetuned_plan()["configurations"]
    everything = b"".join(path.read_bytes() for path in stock.folder.rglob("*") if path.is_file())
    assert b"Doe_Jane" not in everything and b"finetuning" not in everything


def test_a_checkpoint_exports_its_fold_alone(tmp_path):
    model = write_model(tmp_path / "results")
    stock = export_stock(model / "fold_1" / "checkpoint_final.pth", tmp_path / "stock")
    assert stock.folds == ("fold_1",) and not (stock.folder / "fold_0").exists()


def test_nnunets_command_installs_the_zip(tmp_path, monkeypatch):
    stock = export_stock(write_model(tmp_path / "results"), tmp_path / "stock", archive=tmp_path / "model.zip")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    model_import.install_model_from_zip_file(str(stock.zip))
    installed = tmp_path / "elsewhere" / NAME / STOCK
    files = {path.relative_to(stock.folder) for path in stock.folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert Path("fold_0", "checkpoint_final.pth") in files and zipfile.ZipFile(stock.zip).testzip() is None


def test_a_network_that_the_plan_does_not_build_is_refused(tmp_path):
    weights = build_network(finetuned_plan(), "3d_fullres", DATASET_JSON).state_dict()
    weights["extra.weight"] = torch.ones(1)
    model = write_model(tmp_path / "results", folds=(0,), network_weights=weights)
    with pytest.raises(UserError, match=r"another network than its plan builds \(1 tensors, such as extra\.weight"):
        export_stock(model, tmp_path / "stock")
    assert not list((tmp_path / "stock" / NAME).iterdir())


def test_a_network_of_this_package_is_refused(tmp_path, monkeypatch):
    model = write_model(tmp_path / "results", folds=(0,))
    monkeypatch.setattr("nnssl_plugin.checkpoints.sharing.stock.LIBRARY", "elsewhere.")
    with pytest.raises(UserError, match="not one that every nnU-Net has"):
        export_stock(model, tmp_path / "stock")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ssl_state": {}}, "is a pretraining"),
        ({"init_args": {"configuration": "2d"}}, "is not a checkpoint of 3d"),
        ({"network_weights": None}, "is not a checkpoint of 3d"),
    ],
)
def test_what_is_no_fine_tuned_model_is_refused(tmp_path, changes, said):
    model = write_model(tmp_path / "results", folds=(0,), **changes)
    with pytest.raises(UserError, match=said):
        export_stock(model, tmp_path / "stock")


def test_a_folder_without_a_finished_fold_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no fold_X"):
        export_stock(tmp_path, tmp_path / "stock")
    save_checkpoint({"network_weights": {}}, tmp_path / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(UserError, match=r"There is no .*plans\.json"):
        export_stock(tmp_path, tmp_path / "stock")


def test_a_model_that_is_there_is_kept(tmp_path):
    model = write_model(tmp_path / "results", folds=(0,))
    export_stock(model, tmp_path / "stock")
    with pytest.raises(UserError, match="is there already"):
        export_stock(model, tmp_path / "stock")


def logits(model: Path, folds) -> torch.Tensor:
    """nnU-Net's prediction for a normalised image (1, 20, 22, 18) that needs several windows: (classes, 20, 22, 18)."""
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    image = torch.randn(1, 20, 22, 18, generator=torch.Generator().manual_seed(1))
    return predictor.predict_logits_from_preprocessed_data(image)


@pytest.mark.slow
def test_it_predicts_the_same_without_this_package(tmp_path, monkeypatch):
    model = write_model(tmp_path / "results")
    stock = export_stock(model, tmp_path / "stock")
    assert VARIABLE in os.environ
    with_plugin = logits(model, (0, 1))
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        logits(model, (0, 1))
    assert torch.equal(logits(stock.folder, (0, 1)), with_plugin)


@pytest.mark.slow
def test_models_of_different_pretrainings_are_averaged_as_folds_of_one_folder(tmp_path):
    first = export_stock(write_model(tmp_path / "a", folds=(0,)), tmp_path / "stock_a").folder
    second = export_stock(write_model(tmp_path / "b", folds=(1,)), tmp_path / "stock_b").folder
    alone = [logits(first, (0,)), logits(second, (1,))]
    (second / "fold_1").rename(first / "fold_5")
    torch.testing.assert_close(logits(first, (0, 5)).float(), torch.stack(alone).float().mean(0), rtol=1e-2, atol=1e-2)
    assert not torch.equal(*alone)
