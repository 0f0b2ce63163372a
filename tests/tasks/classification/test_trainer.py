"""The classification trainer: what it reads from the plan, what moves, what it keeps, and going on after a stop."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, fake_plan
from labelled_dataset import DIAGNOSIS, GRADE, SIGNS, class_labels, make_classifier
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from pretraining_harness import assert_same

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.classification.loading import load_classifier
from nnssl_plugin.tasks.classification.settings import read_finetuning
from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer

DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


@pytest.fixture(autouse=True)
def quick(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for drawing in ("trainer.draw_progress", "figures.draw_class_figures"):
        monkeypatch.setattr(f"nnssl_plugin.tasks.classification.{drawing}", lambda *given, **more: None)


def state_of(trainer):
    return {
        "network": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
        "best": trainer.best,
        "losses": trainer.log.history()["train_losses"],
        "auroc": trainer.log.history()["auroc"],
    }


def run(**arguments):
    trainer = make_classifier(**arguments)
    trainer.run_training()
    return trainer


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def copy_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(monkeypatch, stop_after):
    setting = {"settings": {"inputs": "windows", "windows": 2, "dropout": 0.3}, "targets": (DIAGNOSIS, SIGNS)}
    whole = state_of(run(**setting))
    stopped = make_classifier(**setting)
    monkeypatch.setattr(stopped.interruption, "requested", lambda: stopped.step >= stop_after)
    with pytest.raises(SystemExit) as left:
        stopped.run_training()
    assert left.value.code == 75
    resumed = make_classifier(**setting, resume="checkpoint_latest.pth")
    assert resumed.step == stop_after
    resumed.run_training()
    assert_same(state_of(resumed), whole)


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    first, same = (state_of(run(settings={"epochs": 1})) for _ in range(2))
    assert_same(first, same)
    other = run(settings={"epochs": 1}, finetuning={"seed": 3})
    key = "backbone.network.encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.equal(other.network.state_dict()[key], first["network"][key])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_trained_fold_is_validated_and_loads(dimensions):
    trainer = run(dimensions=dimensions, targets=(DIAGNOSIS, SIGNS, GRADE), settings={"epochs": 2, "stages": 2})
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder)
    assert (folder / "checkpoint_best.pth").is_file() and not (folder / "checkpoint_latest.pth").is_file()
    loaded = load_classifier(folder.parent, 0)
    cases = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder)
    for target in loaded.targets:
        rows = list(csv.DictReader((folder / "validation" / f"predictions_{target.name}.csv").open()))
        assert [row["case"] for row in rows] == sorted(trainer.do_split()[1])
        data = cases.load_case(rows[0]["case"])[0]
        expected = loaded.probabilities(loaded.inputs(data)[None])[target.name][0]
        written = [float(rows[0][f"p_{name}"]) for name in target.classes]
        np.testing.assert_allclose(written, expected, atol=1e-5)
    history = trainer.log.history()
    assert len(history["auroc/diagnosis"]) == 2 and all(0 <= a <= 1 for a in history["auroc"])


def test_the_best_epoch_is_that_of_the_largest_auroc():
    trainer = run(settings={"epochs": 4, "lr": 0.02})
    auroc, losses = (trainer.log.history()[name] for name in ("auroc", "val_losses"))
    best = max(range(4), key=lambda epoch: (auroc[epoch], -losses[epoch]))
    kept = read_checkpoint(os.path.join(trainer.output_folder, "checkpoint_best.pth"))
    assert kept["current_epoch"] == best + 1
    assert kept["classification"]["best"] == (auroc[best], -losses[best])


def test_validation_is_by_the_final_weights_and_the_best_ones_have_tables_that_say_so():
    trainer = run(settings={"epochs": 4, "lr": 0.02})
    final = copy_of(trainer.network)
    trainer.perform_actual_validation()
    assert_same(copy_of(trainer.network), final)
    folder = Path(trainer.output_folder)
    summary = read_json(folder / "validation" / "summary.json")
    assert summary["checkpoint"] == "final" and "warning" not in summary
    assert summary["auroc"] == pytest.approx(trainer.log.history()["auroc"][-1])
    assert not (folder / "validation_best").exists()
    trainer.load_checkpoint(str(folder / "checkpoint_best.pth"))  # as nnU-Net's --val_best does
    trainer.perform_actual_validation()
    best = read_json(folder / "validation_best" / "summary.json")
    assert best["checkpoint"] == "best" and "chosen on validation cases" in best["warning"]
    assert best["auroc"] == pytest.approx(max(trainer.log.history()["auroc"]))
    assert read_json(folder / "validation" / "summary.json") == summary
    for name, kind in (("validation", "final"), ("validation_best", "best")):
        rows = list(csv.DictReader((folder / name / "predictions.csv").open()))
        assert {row["checkpoint"] for row in rows} == {kind}


def test_a_validation_fold_of_one_class_goes_by_the_loss():
    target = Target("malignant", "binary", ("no", "yes"))
    names = [f"case_{i:02d}" for i in range(6)]
    labels = ClassLabels((target,), {n: n for n in names}, {"malignant": {n: int(i >= 4) for i, n in enumerate(names)}})
    trainer = run(labels=labels)
    assert "AUROC is not defined" in log_of(trainer)
    losses = trainer.log.history()["val_losses"]
    assert trainer.best == (0.0, -min(losses))
    trainer.perform_actual_validation()
    assert "auroc not defined" in log_of(trainer)


def weights_file(folder, **provenance):
    """Weights as ``adapt`` writes them, in the preprocessed dataset's folder."""
    state = build_network(fake_plan(), "3d_fullres", DATASET_JSON).state_dict()
    save_checkpoint({"network_weights": state, **provenance}, folder / "pretrained.pth")
    return state


def test_pretrained_weights_are_loaded_once_and_reported(tmp_path):
    trainer = make_classifier(finetuning={"weights": "pretrained.pth"})
    state = weights_file(Path(trainer.preprocessed_dataset_folder_base))
    trainer.on_train_start()
    loaded = trainer.network.backbone.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items() if key.startswith("encoder."))
    assert "100.0%" in log_of(trainer) and "starts from pretrained.pth" in log_of(trainer)
    trainer.step, before = 1, copy_of(trainer.network)
    os.remove(Path(trainer.preprocessed_dataset_folder_base, "pretrained.pth"))
    trainer.on_train_start()
    assert_same(copy_of(trainer.network), before)


def test_weights_that_cover_too_little_are_refused():
    trainer = make_classifier(finetuning={"weights": "pretrained.pth"})
    weights_file(Path(trainer.preprocessed_dataset_folder_base), provenance={"trained": ["encoder.stages.0"]})
    with pytest.raises(UserError, match="of the encoder's parameters come from the checkpoint"):
        trainer.on_train_start()


def test_missing_weights_are_named():
    trainer = make_classifier(finetuning={"weights": "nowhere.pth"})
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        trainer.on_train_start()


def test_without_a_finetuning_block_training_starts_from_scratch():
    trainer = make_classifier()
    trainer.initialize()
    assert "starts from scratch" in log_of(trainer) and trainer.initial_lr == 1e-3
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_a_linear_probe_moves_the_head_alone():
    trainer = make_classifier(finetuning={"trains": "head"}, settings={"epochs": 1, "inputs": "windows"})
    trainer.initialize()
    before = copy_of(trainer.network)
    trainer.run_training()
    moved = {
        key.split(".")[0] for key, value in trainer.network.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"heads", "windows"}


def test_a_frozen_encoder_begins_to_move_when_the_plan_says():
    trainer = make_classifier(finetuning={"frozen_encoder_epochs": 2, "layer_decay": 0.5, "warmup_epochs": 0})
    trainer.initialize()
    before, rates, moved = copy_of(trainer.network.backbone), [], []
    end = trainer.on_epoch_end

    def watched():
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        moved.append(any(not torch.equal(v, before[k]) for k, v in trainer.network.backbone.state_dict().items()))
        end()

    trainer.on_epoch_end = watched
    trainer.run_training()
    assert moved == [False, False, True]
    assert rates[0][1:] == [0, 0, 0] and rates[2][1] == pytest.approx(rates[2][0] / 8)


def test_cropping_and_every_way_to_balance_train():
    for balance in ("weights", "sampling", "none"):
        trainer = run(settings={"epochs": 1, "balance": balance, "crop": "foreground", "mirror": False})
        assert np.isfinite(trainer.log.history()["train_losses"]).all()
        assert trainer.inference_allowed_mirroring_axes is None
    loaded = load_classifier(Path(trainer.output_folder).parent, 0)
    data, segmentation, _, _ = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder).load_case("case_00")
    assert loaded.inputs(data, segmentation).shape == (1, 1, 16, 16, 16)
    with pytest.raises(UserError, match="segmentation"):
        loaded.inputs(data)


def test_all_cases_train_in_fold_all_and_cases_without_label_never():
    labels = class_labels()
    kept = [case for case in labels.cases if case != "case_05"]
    fewer = ClassLabels(
        labels.targets,
        {case: labels.subjects[case] for case in kept},
        {"diagnosis": {case: labels.labels["diagnosis"][case] for case in kept}},
    )
    assert make_classifier(fold="all", labels=fewer).do_split() == (kept, kept)
    train, validation = make_classifier(labels=fewer).do_split()
    assert train and validation and sorted(train + validation) == kept


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"inputs": "crops"}, "resize, windows"),
        ({"windows": 0}, "whole number"),
        ({"stages": True}, "expected"),
        ({"label_smoothing": 1.0}, r"\[0, 1\)"),
        ({"lr": -1}, "above 0"),
        ({"balance": "both"}, "sampling"),
        ({"dropout": "much"}, "expected"),
        ({"learning_rate": 1}, "Unknown setting"),
        ({"crop": "box"}, "foreground"),
        ({"targets": ["grade"]}, "the dataset has: diagnosis"),
        ({"batch_size": 2.5}, "whole number"),
        ({"crop_margin": -0.1}, "from 0"),
        ({"targets": [1]}, "each entry a text"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, said):
    with pytest.raises(UserError, match=said):
        make_classifier(settings=settings)
    assert not any(Path(os.environ["nnUNet_results"]).iterdir())


def test_other_things_that_cannot_be_used_are_named(monkeypatch):
    with pytest.raises(UserError, match="no decoder"):
        make_classifier(finetuning={"trains": "decoder"})
    with pytest.raises(UserError, match="no fold 2"):
        make_classifier(fold=2).initialize()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="several ranks"):
        make_classifier()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    trainer = make_classifier()
    save_checkpoint({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, tmp_path / "fold_0" / "other.pth")
    with pytest.raises(UserError, match="no classifier"):
        trainer.load_checkpoint(str(tmp_path / "fold_0" / "other.pth"))
    with pytest.raises(UserError, match="nnUNetTrainer"):
        load_classifier(tmp_path, 0, checkpoint="other.pth")


def test_nnunet_finds_the_trainer_by_name():
    found = recursive_find_trainer_class_by_name("PretrainedClassificationTrainer")
    assert found is PretrainedClassificationTrainer


def test_the_results_folder_holds_what_prediction_reads():
    trainer = run(settings={"epochs": 1})
    folder = Path(trainer.output_folder).parent
    assert read_json(folder / "plans.json")["classification"]["epochs"] == 1
    assert (folder / "dataset.json").is_file() and folder.parent.name == NAME


def test_settings_of_the_fine_tuning_without_weights_train_from_scratch():
    settings = read_finetuning({"plans_name": "mine", "finetuning": {"epochs": 10, "seed": 1}}, "3d_fullres")
    assert (settings.epochs, settings.seed, settings.weights) == (10, 1, None)
