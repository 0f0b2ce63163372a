"""The pretrainer, proved with a toy method: exact resume, skipped steps, stops, logs, checkpoints."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pretraining_harness import assert_same, make_trainer, run, state_of
from toy_method import Settings, ToyPretrainer

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import settings_from
from nnssl_plugin.training.interruption import DEADLINE, TO_BE_CONTINUED

LATEST = "checkpoint_latest.pth"


class Killed(Exception):
    """Stands for a kill: nothing gets the chance to save."""


class KilledToy(ToyPretrainer):
    """Dies in the middle of its third epoch."""

    def train_step(self, batch):
        if self.step == 12:
            raise Killed
        return super().train_step(batch)


KilledToy.__name__ = "ToyPretrainer"  # nnU-Net names the output folder after the class


FIGURES = [f"nnssl_plugin.pretraining.pretrainer.{name}" for name in ("draw_progress", "draw_pictures")]
_four_epochs = {}


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch, request):
    """No workers, and no figures (they take longer than the training) but for the test of the figures."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in FIGURES if "draws" not in request.node.name else []:
        monkeypatch.setattr(name, lambda *arguments: None)


@pytest.fixture
def reference(in_process):
    """State and history of four epochs in one go, computed once."""
    if not _four_epochs:
        trainer = run()
        _four_epochs["result"] = state_of(trainer), trainer.log.history()
    return _four_epochs["result"]


def test_two_runs_in_one_go_are_the_same(reference):
    assert_same(reference[0], state_of(run()))


def test_another_seed_gives_other_weights(reference):
    other = state_of(run(pretraining={"seed": 7}))
    assert not torch.equal(other["task"]["head.0.weight"], reference[0]["task"]["head.0.weight"])


def test_two_epochs_and_two_more_equal_four(reference):
    trainer = make_trainer()
    trainer.on_train_start()
    for _ in range(2):
        one_epoch(trainer)
    trainer.interruption.release()
    resumed = make_trainer(resume=LATEST)
    assert resumed.current_epoch == 2 and resumed.step == 10
    resumed.run_training()
    assert_same(reference[0], state_of(resumed))


def test_kill_in_the_middle_of_an_epoch_changes_nothing(reference):
    with pytest.raises(Killed):
        run(trainer_class=KilledToy)
    resumed = make_trainer(resume=LATEST)
    assert resumed.step == 10  # back to the end of the last whole epoch
    resumed.run_training()
    assert_same(reference[0], state_of(resumed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_in_mid_epoch_and_resume_is_exact(reference, number):
    trainer = make_trainer()
    step = trainer.train_step
    trainer.train_step = lambda batch: (os.kill(os.getpid(), number) if trainer.step == 6 else None, step(batch))[1]
    with pytest.raises(SystemExit) as stopped:
        trainer.run_training()
    assert stopped.value.code == TO_BE_CONTINUED
    resumed = make_trainer(resume=LATEST)
    assert resumed.step == 7 and resumed.current_epoch == 1 and resumed.num_iterations_per_epoch == 3
    resumed.run_training()
    assert_same(reference[0], state_of(resumed))
    for name in ("train_losses", "val_losses", "lrs", "train/contrast"):  # the half epoch's sums were kept too
        np.testing.assert_allclose(resumed.log.history()[name], reference[1][name], rtol=1e-6)


@pytest.mark.slow
def test_two_workers_give_the_same_weights(reference, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    assert_same(reference[0], state_of(run()))
    with pytest.raises(Killed):
        run(trainer_class=KilledToy)
    resumed = make_trainer(resume=LATEST)
    resumed.run_training()
    assert_same(reference[0], state_of(resumed))


def test_time_limit_stops_with_a_checkpoint(monkeypatch):
    monkeypatch.setenv(DEADLINE, "1")
    trainer = make_trainer()
    with pytest.raises(SystemExit) as stopped:
        trainer.run_training()
    assert stopped.value.code == TO_BE_CONTINUED and trainer.step == 1
    assert Path(trainer.output_folder, LATEST).is_file()


def test_non_finite_steps_are_skipped_and_counted():
    """Steps 5 to 7 are NaN: weights, optimiser, teacher and queue stand still, and the run goes on."""
    broken = {"method": {"break_from": 5, "break_until": 8}}
    trainer = make_trainer(pretraining=broken)
    before = {}
    step = trainer.train_step

    def watched(batch):
        if trainer.step == 5:
            before.update({k: v.clone() for k, v in trainer.task.state_dict().items()})
        result = step(batch)
        if trainer.step == 8:
            after = trainer.task.state_dict()
            for key in before:
                assert key == "steps" or torch.equal(before[key], after[key]), key
        return result

    trainer.train_step = watched
    trainer.run_training()
    assert before
    assert trainer.log.history()["skipped_steps"] == [0, 3, 0, 0]
    assert np.isfinite(trainer.log.history()["train_losses"]).all()
    assert all(torch.isfinite(v).all() for v in trainer.task.state_dict().values())


def test_optimiser_does_not_count_skipped_steps():
    broken = {"method": {"break_from": 5, "break_until": 8}}
    counts = {float(s["step"]) for s in run(pretraining=broken).optimizer.state_dict()["state"].values()}
    assert counts == {17.0}


def test_many_skipped_steps_stop_the_run_and_keep_the_last_good_checkpoint():
    block = {"max_skipped_in_a_row": 6, "method": {"break_from": 8, "break_until": 100}}
    trainer = make_trainer(pretraining=block)
    with pytest.raises(UserError, match="in a row"):
        trainer.run_training()
    trainer.interruption.release()
    kept = make_trainer(pretraining=block, resume=LATEST)
    assert kept.step == 10 and all(torch.isfinite(v).all() for v in kept.task.state_dict().values())


def test_checkpoint_holds_the_bare_network_and_opens_without_unpickling():
    trainer = run()
    checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=True)
    bare = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 2, 2, False)
    assert checkpoint["network_weights"].keys() == bare.state_dict().keys()
    assert checkpoint["provenance"]["trained"] == ["encoder.", "decoder.encoder."]
    assert checkpoint["provenance"]["steps"] == 20 and checkpoint["trainer_name"] == "ToyPretrainer"
    assert checkpoint["citations"] == [{"type": "Pretraining", "name": "toy", "apa_citations": ["A toy."]}]
    assert not any(key.startswith("backbone.network") for key in checkpoint["ssl_state"]["task"])
    assert "queue" in checkpoint["ssl_state"]["task"]
    assert not Path(trainer.output_folder, LATEST).exists()


def test_decoder_that_no_loss_reaches_stays_initial():
    torch.manual_seed(12345)
    trainer = make_trainer()
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.task.backbone.network.decoder.stages.state_dict().items()}
    trainer.run_training()
    assert_same(before, dict(trainer.task.backbone.network.decoder.stages.state_dict()))


def test_logs_one_number_per_epoch_and_draws_it():
    trainer = run()
    history = trainer.log.history()
    expected = (
        "train_losses",
        "val_losses",
        "lrs",
        "train/contrast",
        "train/size",
        "val/contrast",
        "feature_std",
        "effective_rank",
        "seconds_waiting",
        "seconds_computing",
        "peak_memory_gib",
        "skipped_steps",
        "diagnostics/queue_norm",
    )
    assert all(len(history[name]) == 4 for name in expected)
    assert Path(trainer.output_folder, "progress.png").stat().st_size > 10_000
    figures = sorted(p.name for p in Path(trainer.output_folder, "figures").iterdir())
    assert figures == ["toy_epoch_0001.png", "toy_epoch_0003.png"]


def test_learning_rate_follows_the_cosine_and_keeps_the_groups_ratio():
    trainer = run()
    groups = trainer.optimizer.param_groups
    assert groups[1]["lr"] == pytest.approx(0.1 * groups[0]["lr"])
    assert groups[0]["lr"] == pytest.approx(1e-3 * (1 + np.cos(np.pi * 19 / 20)) / 2)


def test_collapse_is_reported_loudly():
    trainer = make_trainer()
    trainer.initialize()
    warning = trainer.log.collapse([torch.ones(8, 16)], 0)
    assert "collapsed" in warning
    assert trainer.log.collapse([torch.randn(8, 16)], 0) == ""


def test_folds_train_and_validate_on_different_cases():
    trainer = run(fold=1)
    assert trainer.training_cases < 6
    assert "fold_1" in trainer.output_folder
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_2d_and_3d_plans(dimensions):
    trainer = run(dimensions=dimensions, pretraining={"epochs": 1})
    assert trainer.task.backbone.dimensions == dimensions and np.isfinite(trainer.log.history()["train_losses"]).all()


def test_settings_come_from_the_plan():
    trainer = make_trainer(pretraining={"epochs": 2, "batch_size": 3, "method": {"temperature": 0.5}})
    trainer.initialize()
    assert trainer.num_epochs == 2 and trainer.batch_size == 3
    assert trainer.method_settings == Settings(temperature=0.5)
    assert "temperature: 0.2 → 0.5" in Path(trainer.log_file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "block, said",
    [
        ({"epochz": 3}, "epochz"),
        ({"epochs": "many"}, "epochs"),
        ({"method": {"queu": 3}}, "queu"),
        ({"method": {"queue": True}}, "queue"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -0.1}, "lr"),
        ({"iterations_per_epoch": 0}, "iterations"),
    ],
)
def test_wrong_settings_are_named(block, said):
    with pytest.raises(UserError, match=said):
        make_trainer(pretraining=block)


def test_a_plan_for_another_method_is_refused_in_words():
    with pytest.raises(UserError, match="is for the method s2dc, not for toy") as error:
        make_trainer(pretraining={"method_name": "s2dc", "method": {"queue": 4}})
    assert "--preset toy" in error.value.remedy
    for name in ("toy", None):
        assert make_trainer(pretraining={"method_name": name, "method": {"queue": 4}}).method_settings.queue == 4


@pytest.mark.parametrize("block", [3, [1], {"method": 3}])
def test_a_pretraining_block_that_is_none_is_refused(block):
    with pytest.raises(UserError, match="expected a block of settings"):
        make_trainer(pretraining=block)


def test_null_keeps_the_planned_batch_size_where_the_method_has_its_own():
    class Larger(ToyPretrainer):
        training_defaults = TrainingSettings(batch_size=5)

    assert settings_from({"batch_size": None}, Larger.training_defaults, "plan").batch_size is None
    trainer = make_trainer(trainer_class=Larger, pretraining={"batch_size": None})
    trainer.initialize()
    assert trainer.batch_size == trainer.configuration_manager.batch_size == 2


@pytest.mark.parametrize("block", [{"batch_size": "four"}, {"batch_size": True}, {"lr": None}, {"epochs": 1.5}])
@pytest.mark.parametrize("default", [None, 4])
def test_values_of_another_type_are_named(block, default):
    """Also where the default is None, whose own type says nothing."""
    (name,) = block
    with pytest.raises(UserError, match=f"'{name}'"):
        settings_from(block, TrainingSettings(batch_size=default), "plan")


def test_resuming_with_other_settings_is_refused_with_the_reason():
    run(pretraining={"epochs": 1})
    with pytest.raises(UserError, match="queue"):
        make_trainer(pretraining={"epochs": 1, "method": {"queue": 16}}, resume="checkpoint_final.pth")


def test_resuming_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no pretraining"):
        make_trainer().load_checkpoint(str(tmp_path / "other.pth"))


def test_too_few_modalities_are_an_error():
    trainer = make_trainer(channels=1)
    with pytest.raises(UserError, match="2 channels"):
        trainer.run_training()


def test_cases_without_enough_modalities_are_left_out(nnunet_environment):
    from fake_dataset import NAME

    from nnssl_plugin.io.files import write_json

    trainer = make_trainer()
    write_json(Path(nnunet_environment["nnUNet_raw"]) / NAME / "modalities.json", {"case_00": [1], "case_01": []})
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    drawn = {case for _ in range(12) for case in next(train)["cases"]}
    assert drawn == {f"case_{i:02d}" for i in range(2, 6)}


def one_epoch(trainer) -> None:
    """One turn of nnU-Net's loop."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    for _ in range(trainer.num_iterations_per_epoch):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.on_train_epoch_end([])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        for _ in range(trainer.num_val_iterations_per_epoch):
            trainer.validation_step(next(trainer.dataloader_val))
        trainer.on_validation_epoch_end([])
    trainer.on_epoch_end()


def test_prediction_with_pretrained_weights_is_refused_in_words():
    """``nnUNetv2_predict`` asks the class for the network, with the plan in the trainer's place."""
    trainer = make_trainer()
    planned = (trainer.plans_manager, trainer.configuration_manager, 2, 2)
    with pytest.raises(UserError, match="not to segment") as error:
        ToyPretrainer.build_network_architecture(*planned, enable_deep_supervision=False)
    assert "nnssl_plugin adapt" in error.value.remedy
