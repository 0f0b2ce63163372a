"""The probe of a running pretraining: its numbers, what it leaves alone, and when it is refused."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from labelled_structures import CASES, FOLD, write_labelled
from pretraining_harness import assert_same, make_trainer, state_of
from toy_method import ToyPretrainer
from toy_variants import OneModalityPretrainer

from nnssl_plugin.errors import UserError
from nnssl_plugin.features.voxels import Draw, LabelledVoxels
from nnssl_plugin.io.files import read_json
from nnssl_plugin.pretraining.probing import DICE, FITTED, SCORED, SHUFFLED, LabelProbe, _evenly
from nnssl_plugin.training.resumable import LATEST

EVERY_SECOND = {"probe_every": 2}


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def labelled(trainer_class=ToyPretrainer, *, fold=0, resume=None, **options):
    """A trainer on the fake dataset whose cubes are a structure."""
    folder, plan, configuration = write_labelled(channels=2, **{"pretraining": EVERY_SECOND} | options)
    plan["continue_training"] = resume is not None
    described = read_json(folder / "dataset.json")
    trainer = trainer_class(plan, configuration, fold, described, torch.device("cpu"))
    if resume:
        trainer.load_checkpoint(os.path.join(trainer.output_folder, resume))
    return trainer


def test_a_run_with_probes_has_the_weights_of_one_without():
    with_probes, without = labelled(), labelled(pretraining={})
    for trainer in (with_probes, without):
        trainer.run_training()
    assert_same(state_of(without), state_of(with_probes))
    history = with_probes.log.history()
    for name in (DICE, SHUFFLED):
        assert np.isfinite(history[name]).tolist() == [False, True, False, True]
        assert name not in without.log.history()


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_last_probe_is_that_of_the_final_weights(dimensions):
    trainer = labelled(pretraining={"probe_every": 100}, dimensions=dimensions)
    trainer.run_training()
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    plan, described = trainer.plans_manager.plans, read_json(folder / "dataset.json")
    cases = LabelledVoxels(folder, plan, trainer.configuration_name, described, CASES)
    fitted = _evenly(FOLD["train"], 2)
    backbone = trainer.task.backbone.eval()
    true, shuffled = cases.fit(backbone, [Draw(tuple(fitted)), Draw(tuple(fitted), shuffled=True)])
    expected = cases.dice(backbone, [true, shuffled], FOLD["val"]).mean((1, 2))
    history = trainer.log.history()
    assert [history[DICE][-1], history[SHUFFLED][-1]] == pytest.approx(expected.tolist())
    assert np.isnan(history[DICE][:-1]).all()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_numbers():
    whole = labelled()
    whole.run_training()
    stopped = labelled()
    step = stopped.train_step
    stopped.train_step = lambda batch: (
        os.kill(os.getpid(), signal.SIGTERM) if stopped.step == 12 else None,
        step(batch),
    )[1]
    with pytest.raises(SystemExit):
        stopped.run_training()
    resumed = labelled(resume=LATEST)
    resumed.run_training()
    assert_same(state_of(whole), state_of(resumed))
    for name in (DICE, SHUFFLED):
        np.testing.assert_array_equal(whole.log.history()[name], resumed.log.history()[name])


def test_cases_that_give_labels_are_not_measured_on():
    everything = labelled(fold="all")
    everything.on_train_start()
    everything.interruption.release()
    probe = everything.label_probe
    assert len(probe.draw.cases) == 3 and not {*probe.draw.cases} & {*probe.scored}
    assert {*probe.draw.cases} | {*probe.scored} == {*CASES}
    assert len(_evenly([str(n) for n in range(1000)], SCORED)) == SCORED > FITTED


def test_what_cannot_be_probed_is_said():
    unlabelled = make_trainer(pretraining=EVERY_SECOND)
    with pytest.raises(UserError, match="name no structures"):
        unlabelled.run_training()
    with pytest.raises(UserError, match=r"reads 1 channels and .* has 2"):
        labelled(OneModalityPretrainer).run_training()
    trainer = labelled()
    trainer.initialize()
    with pytest.raises(UserError, match="too few cases"):
        LabelProbe(trainer.datasets[0], CASES[:1], CASES[:1], channels=2)


def test_a_dataset_without_labels_is_pretrained_on_unprobed():
    write_fake_dataset(channels=2)
    trainer = make_trainer()
    trainer.on_train_start()
    trainer.interruption.release()
    assert trainer.label_probe is None
