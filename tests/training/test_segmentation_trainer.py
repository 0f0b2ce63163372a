"""Fine-tuning: the plan's block, what is loaded when, the groups, the frozen encoder, and resuming."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from nnssl_plugin.checkpoints.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.finetuning import adapt_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.files import read_json, write_json
from nnssl_plugin.plan_files import build_network
from nnssl_plugin.training.segmentation import PretrainedSegmentationTrainer, parameter_groups, read_settings

TRAINED = ["encoder.", "decoder.encoder."]
DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


@pytest.fixture
def folder(nnunet_environment, monkeypatch, tmp_path) -> Path:
    """A preprocessed dataset with the plan nnUNetPlans-toy, and the checkpoint that it was adapted from."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(cases=5)
    weights = build_network(fake_plan(), "3d_fullres", DATASET_JSON).state_dict()
    save_checkpoint({"network_weights": weights, "provenance": {"trained": TRAINED}}, tmp_path / "source.pth")
    adapt_checkpoint("901", name="toy", weights=tmp_path / "source.pth")
    return Path(os.environ["nnUNet_preprocessed"], NAME)


def trainer(folder, *, plan="nnUNetPlans-toy", kind=PretrainedSegmentationTrainer, **settings):
    plans = read_json(folder / f"{plan}.json")
    plans["finetuning"] |= {"epochs": 4, "iterations_per_epoch": 2, "validation_iterations": 1} | settings
    plans["continue_training"] = False
    return kind(plans, "3d_fullres", "all", read_json(folder / "dataset.json"), device=torch.device("cpu"))


def batches(count):
    """Batches as nnU-Net's loader gives them: image (B, 1, 16, 16, 16), and a target per deep supervision output."""
    generator = torch.Generator().manual_seed(0)
    return [{"data": torch.randn(2, 1, 16, 16, 16, generator=generator),
             "target": [(torch.rand(2, 1, s, s, s, generator=generator) > 0.5).float() for s in (16, 8)]}
            for _ in range(count)]


def train_epochs(subject, epochs, data):
    """The part of nnU-Net's run_training that changes weights, on given batches."""
    for epoch in epochs:
        subject.current_epoch = epoch
        subject.on_train_epoch_start()
        for batch in data[epoch * 2:epoch * 2 + 2]:
            subject.train_step(deepcopy(batch))


def copy_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_a_fresh_start_loads_what_was_trained_and_a_run_predicts(folder, tmp_path):
    subject = trainer(folder, epochs=1)
    subject.initialize()
    initial = copy_of(subject.network)
    subject.on_train_start()
    source = read_checkpoint(tmp_path / "source.pth")["network_weights"]
    for key, value in subject.network.state_dict().items():
        expected = source if key.startswith(tuple(TRAINED)) else initial
        assert torch.equal(value, expected[key]), key
    log = Path(subject.log_file).read_text()
    assert "Loaded pretrained weights" in log and "100.0%" in log and "epochs: None → 1" in log
    subject.run_training()
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False,
                                use_mirroring=False)
    predictor.initialize_from_trained_model_folder(subject.output_folder_base, ("all",), "checkpoint_final.pth")
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 18, 20, 17))
    assert logits.shape == (2, 18, 20, 17) and torch.isfinite(logits).all()


def test_nnunet_finds_the_trainer_by_name():
    found = recursive_find_trainer_class_by_name("PretrainedSegmentationTrainer")
    assert found is PretrainedSegmentationTrainer


def test_a_resumed_training_does_not_load_the_weights_again(folder):
    subject = trainer(folder)
    subject.initialize()
    subject.current_epoch = 2
    before = copy_of(subject.network)
    subject.on_train_start()
    assert all(torch.equal(value, before[key]) for key, value in subject.network.state_dict().items())


def test_the_twin_trains_from_its_own_initialisation(folder):
    adapt_checkpoint("901", name="scratch", from_scratch=True)
    subject = trainer(folder, plan="nnUNetPlans-scratch")
    subject.initialize()
    before = copy_of(subject.network)
    subject.on_train_start()
    assert all(torch.equal(value, before[key]) for key, value in subject.network.state_dict().items())


def test_arms_of_one_seed_start_from_the_same_network_and_see_the_same_batches(folder):
    def start(seed):
        subject = trainer(folder, weights=None, seed=seed)
        subject.initialize()
        initial = copy_of(subject.network)
        loader, _ = subject.get_dataloaders()
        return initial, next(loader)["data"]

    (first, batch), (second, same), (third, other) = start(3), start(3), start(4)
    assert all(torch.equal(first[key], second[key]) for key in first) and torch.equal(batch, same)
    assert not all(torch.equal(first[key], third[key]) for key in first) and not torch.equal(batch, other)


def test_without_any_setting_a_step_is_nnunets(folder):
    ours, theirs = (trainer(folder, kind=kind, warmup_epochs=0)
                    for kind in (PretrainedSegmentationTrainer, nnUNetTrainer))
    theirs.num_epochs = ours.num_epochs
    for subject in (ours, theirs):
        subject.initialize()
        subject.network.load_state_dict(read_checkpoint(folder / "nnUNetPlans-toy_3d_fullres.pth")["network_weights"])
        train_epochs(subject, range(3), batches(6))
    reference = theirs.network.state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in ours.network.state_dict().items())


def test_the_frozen_encoder_does_not_move_and_gathers_no_momentum(folder):
    subject = trainer(folder, frozen_encoder_epochs=2, warmup_epochs=1)
    subject.initialize()
    subject.load_pretrained_weights()
    before, data = copy_of(subject.network), batches(8)
    train_epochs(subject, range(2), data)
    encoder = dict(subject.network.encoder.named_parameters())
    assert all(torch.equal(value, before[f"encoder.{key}"]) for key, value in encoder.items())
    assert not any(parameter in subject.optimizer.state for parameter in encoder.values())
    moved = subject.network.decoder.stages[0].convs[0].conv.weight
    assert not torch.equal(moved, before["decoder.stages.0.convs.0.conv.weight"])
    assert [group["lr"] for group in subject.optimizer.param_groups[1:]] == [0.0] * 3
    assert "encoder stage 0 0.0" in Path(subject.log_file).read_text()
    train_epochs(subject, [2], data)
    assert all(not torch.equal(value, before[f"encoder.{key}"]) for key, value in encoder.items()
               if key.endswith("conv.weight"))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_exact(folder, stop):
    settings = {"frozen_encoder_epochs": 2, "layer_decay": 0.5, "warmup_epochs": 1}
    data, whole = batches(8), trainer(folder, **settings)
    whole.initialize()
    whole.load_pretrained_weights()
    train_epochs(whole, range(stop), data)
    file = str(Path(whole.output_folder, "checkpoint_latest.pth"))
    whole.save_checkpoint(file)
    train_epochs(whole, range(stop, 4), data)
    resumed = trainer(folder, **settings)
    resumed.load_checkpoint(file)
    assert resumed.current_epoch == stop
    train_epochs(resumed, range(resumed.current_epoch, 4), data)
    reference = whole.network.state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in resumed.network.state_dict().items())
    momenta = [[state["momentum_buffer"] for state in subject.optimizer.state.values()] for subject in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


@pytest.mark.parametrize(("kind", "blocks"), [("PlainConvUNet", "n_conv_per_stage"),
                                              ("ResidualEncoderUNet", "n_blocks_per_stage")])
def test_groups_hold_every_parameter_once_with_rates_by_depth(kind, blocks):
    plans = fake_plan()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{kind}"
    architecture["arch_kwargs"][blocks] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    network = build_network(plans, "3d_fullres", DATASET_JSON)
    groups = parameter_groups(network, layer_decay=0.5, frozen_until=3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    assert [(g["name"], g["lr_scale"], g["frozen_until"]) for g in groups] == [
        ("decoder", 1.0, 0), ("encoder stage 0", 0.125, 3), ("encoder stage 1", 0.25, 3), ("encoder stage 2", 0.5, 3)]
    encoder = {id(p) for p in network.encoder.parameters()}
    assert all((id(p) in encoder) == (group["name"] != "decoder") for group in groups for p in group["params"])
    if kind == "ResidualEncoderUNet":
        assert {id(p) for p in network.encoder.stem.parameters()} <= {id(p) for p in groups[1]["params"]}


def test_a_network_without_stages_needs_the_plain_settings():
    assert len(parameter_groups(nn.Linear(2, 2), layer_decay=1.0, frozen_until=0)) == 1
    with pytest.raises(UserError, match="no encoder stages"):
        parameter_groups(nn.Linear(2, 2), layer_decay=0.9, frozen_until=0)


def test_learning_rate_and_schedule_come_from_the_plan(folder):
    subject = trainer(folder, lr=0.004, epochs=100, warmup_epochs=None)
    subject.initialize()
    assert subject.lr_scheduler.warmup == 5 and subject.lr_scheduler.rate(5) == 0.004
    assert (subject.num_epochs, subject.num_iterations_per_epoch, subject.num_val_iterations_per_epoch) == (100, 2, 1)


@pytest.mark.parametrize(("block", "said"), [
    (None, "no finetuning block"),
    ({"epochs": 3}, "no finetuning block"),
    ({"weights": None, "epoch": 3}, "Unknown setting 'epoch'"),
    ({"weights": None, "layer_decay": "0.5"}, "expected float"),
    ({"weights": None, "layer_decay": 1.5}, r"expected a number in \(0, 1\]"),
    ({"weights": None, "epochs": "50"}, "whole number from 1"),
    ({"weights": None, "epochs": True}, "whole number from 1"),
    ({"weights": None, "seed": -1}, "whole number from 0"),
    ({"weights": None, "lr": 0}, "positive number"),
    ({"weights": 3}, "a file name"),
    ({"weights": "a.pth", "configuration": "2d"}, "adapted to 2d, not to 3d_fullres"),
])
def test_a_block_that_does_not_fit_is_refused(block, said):
    plans = {"plans_name": "nnUNetPlans"} | ({} if block is None else {"finetuning": block})
    with pytest.raises(UserError, match=said):
        read_settings(plans, "3d_fullres")


def test_a_plan_without_the_block_leaves_no_results(folder):
    plans = read_json(folder / "nnUNetPlans.json") | {"continue_training": False}
    with pytest.raises(UserError, match="nnssl_plugin adapt"):
        PretrainedSegmentationTrainer(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    assert not list(Path(os.environ["nnUNet_results"]).iterdir())


def test_missing_weights_are_named(folder):
    (folder / "nnUNetPlans-toy_3d_fullres.pth").unlink()
    with pytest.raises(UserError, match=r"nnUNetPlans-toy_3d_fullres\.pth of plan nnUNetPlans-toy are not there"):
        trainer(folder).on_train_start()


def test_weights_that_no_longer_fit_the_plan_are_refused(folder):
    plan = read_json(folder / "nnUNetPlans-toy.json")
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 12]
    write_json(folder / "nnUNetPlans-toy.json", plan)
    subject = trainer(folder)
    subject.initialize()
    with pytest.raises(UserError, match="of the encoder's parameters come from the checkpoint"):
        subject.load_pretrained_weights()


def test_a_compiled_network_is_loaded_through_its_wrapper(folder, tmp_path):
    subject = trainer(folder, layer_decay=0.5)
    subject.initialize()
    subject.network = torch.compile(subject.network)
    subject.load_pretrained_weights()
    source = read_checkpoint(tmp_path / "source.pth")["network_weights"]
    loaded = subject.network._orig_mod.encoder.state_dict()
    assert all(torch.equal(value, source[f"encoder.{key}"]) for key, value in loaded.items())
    assert [group["lr_scale"] for group in subject.configure_optimizers()[0].param_groups] == [1.0, 0.125, 0.25, 0.5]
