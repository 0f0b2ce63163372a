"""Fine-tuning: the plan's block, what is loaded when, the groups, the frozen encoder, and resuming."""

import multiprocessing
import os
import signal
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from pretraining_harness import assert_same
from small_primus import with_primus

from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.settings import read_settings
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer
from nnssl_plugin.training.interruption import DEADLINE

TRAINED = ["encoder.", "decoder.encoder."]
DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


@pytest.fixture
def folder(nnunet_environment, monkeypatch, tmp_path) -> Path:
    """A preprocessed dataset with the plan nnUNetPlans-toy, and the checkpoint that it was adapted from."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(cases=5)
    weights = build_network(fake_plan(), "3d_fullres", DATASET_JSON).state_dict()
    provenance = {"trained": TRAINED, "network": describe_network(fake_plan(), "3d_fullres")}
    save_checkpoint({"network_weights": weights, "provenance": provenance}, tmp_path / "source.pth")
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
    return [
        {
            "data": torch.randn(2, 1, 16, 16, 16, generator=generator),
            "target": [(torch.rand(2, 1, s, s, s, generator=generator) > 0.5).float() for s in (16, 8)],
        }
        for _ in range(count)
    ]


def train_epochs(subject, epochs, data):
    """The part of nnU-Net's run_training that changes weights, on given batches."""
    for epoch in epochs:
        subject.current_epoch = epoch
        subject.on_train_epoch_start()
        for batch in data[epoch * 2 : epoch * 2 + 2]:
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
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, use_mirroring=False
    )
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
    ours, theirs = (
        trainer(folder, kind=kind, warmup_epochs=0) for kind in (PretrainedSegmentationTrainer, nnUNetTrainer)
    )
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
    assert all(
        not torch.equal(value, before[f"encoder.{key}"])
        for key, value in encoder.items()
        if key.endswith("conv.weight")
    )


def test_the_decoders_warm_up_comes_before_that_of_everything(folder):
    subject = trainer(folder, decoder_warmup_epochs=2, warmup_epochs=1)
    subject.initialize()
    subject.load_pretrained_weights()
    before, data = copy_of(subject.network), batches(8)
    train_epochs(subject, range(2), data)
    encoder = dict(subject.network.encoder.named_parameters())
    assert all(torch.equal(value, before[f"encoder.{key}"]) for key, value in encoder.items())
    assert not torch.equal(
        subject.network.decoder.stages[0].convs[0].conv.weight, before["decoder.stages.0.convs.0.conv.weight"]
    )
    rates = []
    for epoch in (0, 1, 2, 3):
        subject.lr_scheduler.step(epoch)
        rates.append(tuple(group["lr"] for group in subject.optimizer.param_groups[:2]))
    assert rates == [(0.005, 0), (0.01, 0), (0.005, 0.005), (0.01, 0.01)]
    train_epochs(subject, [2], data)
    assert not torch.equal(encoder["stages.0.0.convs.0.conv.weight"], before["encoder.stages.0.0.convs.0.conv.weight"])


def test_a_linear_probe_trains_the_segmentation_layers_alone(folder):
    subject = trainer(folder, trains="head", warmup_epochs=0)
    subject.initialize()
    subject.load_pretrained_weights()
    before = copy_of(subject.network)
    train_epochs(subject, range(2), batches(4))
    moved = {key for key, value in subject.network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias"}  # the loss skips the coarsest
    assert [group["name"] for group in subject.optimizer.param_groups] == ["head"]


RECIPES = [
    {},
    {"frozen_encoder_epochs": 2},
    {"decoder_warmup_epochs": 1},
    {"layer_decay": 0.5},
    {"trains": "head"},
    {"trains": "decoder", "lr": 0.003, "weight_decay": 0.0, "optimiser": "adamw"},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_twin_shares_everything_but_the_weights(folder, recipe):
    """What the plan asks for is kept by both; groups, rates, batches, fresh layers and optimiser are equal."""
    plan = read_json(folder / "nnUNetPlans.json")
    write_json(folder / "asked.json", plan | {"plans_name": "asked", "finetuning": {"seed": 3, "epochs": 4, **recipe}})
    adapt_checkpoint("901", name="one", weights=folder / "nnUNetPlans-toy_3d_fullres.pth", plans_name="asked")
    adapt_checkpoint("901", name="scratch", plans_name="asked", from_scratch=True)
    arms = [trainer(folder, plan=f"asked-{name}") for name in ("one", "scratch")]
    blocks = [read_json(folder / f"asked-{name}.json")["finetuning"] for name in ("one", "scratch")]
    differing = {key for key in blocks[0] | blocks[1] if blocks[0].get(key) != blocks[1].get(key)}
    assert differing <= {"weights", "source", "twin_of"}
    states, drawn, described = [], [], []
    for arm in arms:
        arm.initialize()
        drawn.append(next(arm.get_dataloaders()[0])["data"])
        if arm.settings.weights is not None:
            arm.load_pretrained_weights()
        states.append(copy_of(arm.network))
        names = {id(p): name for name, p in arm.network.named_parameters()}
        rates = []
        for epoch in range(4):
            arm.lr_scheduler.step(epoch)
            rates.append(arm.lr_scheduler.get_last_lr())
        described.append(
            (
                type(arm.optimizer),
                arm.optimizer.defaults,
                rates,
                [[names[id(p)] for p in group["params"]] for group in arm.optimizer.param_groups],
                [name for name, p in arm.network.named_parameters() if p.requires_grad],
            )
        )
    assert torch.equal(*drawn) and described[0] == described[1]
    loaded, fresh = states
    same = {key for key in loaded if torch.equal(loaded[key], fresh[key]) and "weight" in key and loaded[key].dim() > 1}
    assert same == {key for key in same if not key.startswith(tuple(TRAINED))} and any(".seg_" in key for key in same)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_exact(folder, stop):
    settings = {"decoder_warmup_epochs": 2, "layer_decay": 0.5, "warmup_epochs": 1}
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


class Counted:
    """The optimiser steps of a trainer, and a signal after one of them."""

    def __init__(self, subject, *, signal_after=None):
        self.steps, step = 0, subject.optimizer.step

        def counted(*given, **more):
            step(*given, **more)
            self.steps += 1
            if self.steps == signal_after:
                os.kill(os.getpid(), signal.SIGTERM)

        subject.optimizer.step = counted


def started(folder, *, resume=None, **settings):
    """A trainer with three steps per epoch whose figures are left out: they take longer than the training."""
    subject = trainer(folder, iterations_per_epoch=3, **settings)
    subject.logger.plot_progress_png = lambda output_folder: None
    if resume is None:
        subject.initialize()
    else:
        subject.load_checkpoint(str(Path(subject.output_folder, resume)))
    return subject


def test_sigterm_stops_after_the_step_and_the_rest_of_the_epoch_is_run(folder):
    subject = started(folder, epochs=2)
    counted = Counted(subject, signal_after=2)
    with pytest.raises(SystemExit) as ended:
        subject.run_training()
    assert ended.value.code == 75 and counted.steps == 2
    before = list(subject.epoch_losses)
    resumed = started(folder, epochs=2, resume="checkpoint_latest.pth")
    assert (resumed.current_epoch, resumed.step, resumed.num_iterations_per_epoch) == (0, 2, 1)
    assert_same(copy_of(subject.network), copy_of(resumed.network))
    momenta = [[state["momentum_buffer"] for state in s.optimizer.state.values()] for s in (subject, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    counted, losses, step = Counted(resumed), before, resumed.train_step
    resumed.train_step = lambda batch: (result := step(batch), losses.append(float(result["loss"])))[0]
    resumed.run_training()
    assert counted.steps == 4 and len(losses) == 6  # with the two before the stop: as many as were planned
    means = resumed.logger.get_value("train_losses", step=None)
    assert means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    kept = read_checkpoint(Path(resumed.output_folder, "checkpoint_final.pth"))
    assert kept["current_epoch"] == 2 and {len(series) for series in kept["logging"].values()} == {2}
    again = started(folder, epochs=2, resume="checkpoint_final.pth")  # as --c does where the validation is left
    again.run_training()
    assert again.step == 6


@pytest.mark.slow
def test_nnunets_workers_outlive_the_signal_that_a_scheduler_sends_to_all(folder, monkeypatch):
    """One that died would break the step that is being finished, or hang the end."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    subject = started(folder, epochs=2)
    step, workers = subject.train_step, []

    def signalled(batch):
        if subject.step == 1:
            workers.extend(multiprocessing.active_children())
            for process in (*workers, multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)
            next(subject.dataloader_train)
        return step(batch)

    subject.train_step = signalled
    with pytest.raises(SystemExit) as ended:
        subject.run_training()
    assert ended.value.code == 75 and subject.step == 2
    assert len(workers) >= 2 and not any(worker.is_alive() for worker in workers)


def test_a_stop_in_the_last_epoch_leaves_the_validation_to_the_next_run(folder, monkeypatch):
    subject = started(folder, epochs=1)
    Counted(subject, signal_after=3)
    subject.run_training()
    with pytest.raises(SystemExit) as ended:
        subject.perform_actual_validation()
    assert ended.value.code == 75 and Path(subject.output_folder, "checkpoint_final.pth").is_file()


def test_the_time_limit_stops_with_a_checkpoint(folder, monkeypatch):
    monkeypatch.setenv(DEADLINE, "1")
    subject = started(folder)
    with pytest.raises(SystemExit) as ended:
        subject.run_training()
    assert ended.value.code == 75 and subject.step == 1
    assert Path(subject.output_folder, "checkpoint_latest.pth").is_file()


def test_a_checkpoint_of_a_stop_is_one_of_nnunet(folder):
    """Stock nnU-Net goes on from it, takes its weights, and opens it without unpickling."""
    subject = started(folder, epochs=2)
    Counted(subject, signal_after=4)
    with pytest.raises(SystemExit):
        subject.run_training()
    file = Path(subject.output_folder, "checkpoint_latest.pth")
    torch.load(file, weights_only=True)
    stock = trainer(folder, kind=nnUNetTrainer)
    stock.configure_optimizers = lambda: PretrainedSegmentationTrainer.configure_optimizers(subject)
    stock.load_checkpoint(str(file))
    assert stock.current_epoch == 1 and len(stock.logger.get_value("val_losses", step=None)) == 1
    other = build_network(read_json(folder / "nnUNetPlans-toy.json"), "3d_fullres", DATASET_JSON)
    load_pretrained_weights(other, str(file))
    for network in (stock.network, other):
        state = network.state_dict()
        assert all(
            torch.equal(value, state[key]) for key, value in subject.network.state_dict().items() if "seg" not in key
        )


def test_checkpoints_that_nnunet_wrote_go_on(folder):
    subject = started(folder)
    train_epochs(subject, [0], batches(2))
    subject.step, subject.current_epoch = 3, 0
    file = str(Path(subject.output_folder, "checkpoint_latest.pth"))
    for key in ("mean_fg_dice", "train_losses", "val_losses", "lrs"):
        subject.logger.local_logger.my_fantastic_logging[key] = [np.float64(0.5)]
    nnUNetTrainer.save_checkpoint(subject, file)
    resumed = started(folder, resume="checkpoint_latest.pth")
    assert (resumed.current_epoch, resumed.step, resumed.epoch_losses) == (1, 3, [])
    assert_same(copy_of(subject.network), copy_of(resumed.network))


def test_going_on_with_another_recipe_is_refused(folder):
    subject = started(folder)
    subject.save_checkpoint(str(Path(subject.output_folder, "checkpoint_latest.pth")))
    with pytest.raises(UserError, match="optimiser does not fit the plan"):
        started(folder, resume="checkpoint_latest.pth", layer_decay=0.5)


def test_a_checkpoint_is_written_after_an_epoch_unless_one_is_fresh(folder):
    for seconds, expected in ((0.0, True), (1000.0, False)):
        subject = started(folder, epochs=2)
        subject.seconds_between_checkpoints = seconds
        latest = Path(subject.output_folder, "checkpoint_latest.pth")
        subject.current_epoch, subject.step = 1, 3
        subject.end_epoch()
        assert latest.is_file() == expected
        latest.unlink(missing_ok=True)


def test_going_on_with_a_seed_does_not_repeat_the_first_batches(folder):
    def first_batch(step):
        subject = started(folder, weights=None, seed=3)
        subject.step = step
        subject.on_train_start()
        subject.interruption.release()
        return next(subject.dataloader_train)["data"]

    start, going_on, same = first_batch(0), first_batch(2), first_batch(2)
    assert torch.equal(going_on, same) and not torch.equal(start, going_on)


def test_learning_rate_and_schedule_come_from_the_plan(folder):
    subject = trainer(folder, lr=0.004, epochs=100, warmup_epochs=None)
    subject.initialize()
    assert subject.lr_scheduler.warmup == 5 and subject.lr_scheduler.rate(5) == 0.004
    assert (subject.num_epochs, subject.num_iterations_per_epoch, subject.num_val_iterations_per_epoch) == (100, 2, 1)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (None, "no finetuning block"),
        ({"weights": None, "epoch": 3}, "Unknown setting 'epoch'"),
        ({"weights": None, "layer_decay": "0.5"}, r"is '0.5'; expected a number in \(0, 1\]"),
        ({"weights": None, "layer_decay": 1.5}, r"expected a number in \(0, 1\]"),
        ({"weights": None, "epochs": "50"}, "whole number from 1"),
        ({"weights": None, "epochs": True}, "whole number from 1"),
        ({"weights": None, "seed": -1}, "whole number from 0"),
        ({"weights": None, "lr": 0}, "expected a number above 0"),
        ({"weights": 3}, "expected a text"),
        ({"epochs": 10}, "has settings in its finetuning block, but no weights"),
        ({"weights": "a.pth", "configuration": "2d"}, "adapted to 2d, not to 3d_fullres"),
    ],
)
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
    with pytest.raises(UserError, match="were not written for the network of plan"):
        subject.load_pretrained_weights()


@pytest.mark.slow
def test_a_compiled_network_is_loaded_through_its_wrapper(folder, tmp_path):
    subject = trainer(folder, layer_decay=0.5)
    subject.initialize()
    subject.network = torch.compile(subject.network)
    subject.load_pretrained_weights()
    source = read_checkpoint(tmp_path / "source.pth")["network_weights"]
    loaded = subject.network._orig_mod.encoder.state_dict()
    assert all(torch.equal(value, source[f"encoder.{key}"]) for key, value in loaded.items())
    assert [group["lr_scale"] for group in subject.configure_optimizers()[0].param_groups] == [1.0, 0.125, 0.25, 0.5]


def primus_batches(count):
    return [{"data": batch["data"], "target": batch["target"][0]} for batch in batches(count)]


@pytest.fixture
def primus_folder(folder, tmp_path) -> Path:
    """The dataset with a plan whose network is a small Primus, adapted from another Primus of the same kind."""
    plan = with_primus(fake_plan()) | {"plans_name": "primus"}
    write_json(folder / "primus.json", plan)
    weights = build_network(plan, "3d_fullres", DATASET_JSON).state_dict()
    provenance = {"trained": ["eva.", "down_projection."], "network": describe_network(plan, "3d_fullres")}
    save_checkpoint({"network_weights": weights, "provenance": provenance}, tmp_path / "primus.pth")
    adapt_checkpoint("901", name="toy", weights=tmp_path / "primus.pth", plans_name="primus")
    return folder


@pytest.mark.slow
def test_primus_trains_as_nnunets_own_trainer_would_and_predicts(primus_folder, tmp_path):
    subject = trainer(primus_folder, plan="primus-toy", epochs=1)
    subject.initialize()
    assert not subject.enable_deep_supervision and type(subject.network).__name__ == "Primus"
    assert isinstance(subject.optimizer, torch.optim.AdamW)
    assert (subject.initial_lr, subject.weight_decay) == (3e-4, 5e-2)
    initial = copy_of(subject.network)
    subject.load_pretrained_weights()
    source = read_checkpoint(tmp_path / "primus.pth")["network_weights"]
    for key, value in subject.network.state_dict().items():
        expected = source if key.startswith(("eva.", "down_projection.")) else initial
        assert torch.equal(value, expected[key]), key
    train_epochs(subject, [0], primus_batches(2))
    assert all(torch.isfinite(value).all() for value in subject.network.state_dict().values())
    again = trainer(primus_folder, plan="primus-toy", epochs=1)
    again.run_training()
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, use_mirroring=False
    )
    predictor.initialize_from_trained_model_folder(again.output_folder_base, ("all",), "checkpoint_final.pth")
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 18, 20, 17))
    assert logits.shape == (2, 18, 20, 17) and torch.isfinite(logits).all()


@pytest.mark.parametrize("recipe", [{"layer_decay": 0.5}, {"decoder_warmup_epochs": 1}, {"trains": "head"}])
def test_recipes_hold_for_primus(primus_folder, recipe):
    subject = trainer(primus_folder, plan="primus-toy", warmup_epochs=0, **recipe)
    subject.initialize()
    subject.load_pretrained_weights()
    before = copy_of(subject.network)
    train_epochs(subject, [0], primus_batches(2))
    after = subject.network.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    if recipe == {"trains": "head"}:
        assert moved == {"up_projection.decode.1.weight", "up_projection.decode.1.bias"}
    else:
        assert any(key.startswith("eva.") for key in moved) == ("layer_decay" in recipe)
        assert "up_projection.decode.0.0.weight" in moved
