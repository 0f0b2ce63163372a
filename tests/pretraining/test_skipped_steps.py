"""The file that the first skipped step of a run leaves."""

from pathlib import Path

import numpy as np
import pytest
from pretraining_harness import make_trainer, run

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.pretraining.skipped_steps import FILE, windows_of

BROKEN = {"method": {"break_from": 6, "break_until": 8}}


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def test_it_names_the_samples_their_places_seeds_and_terms():
    trainer = make_trainer(pretraining=BROKEN)
    batches = {}
    step = trainer.train_step
    trainer.train_step = lambda batch: (batches.update({trainer.step: batch}), step(batch))[1]
    trainer.run_training()
    path = Path(trainer.output_folder, FILE)
    said, batch = read_json(path), batches[6]
    assert said["skipped_step"] == 6 and said["epoch"] == 1
    assert [each["case"] for each in said["samples"]] == batch["cases"]
    assert all(tuple(e["origin"]) == p.origin for e, p in zip(said["samples"], batch["places"], strict=True))
    assert said["terms"]["contrast"] == "nan" and said["terms"]["total"] == "nan" and said["terms"]["size"] > 0
    assert said["seeds"]["views"] == trainer.seeds(0, 6)[0]
    np.testing.assert_array_equal(np.stack(windows_of(path)), batch["image"].numpy())


def test_inspect_shows_it_and_says_how_to_replay(capsys):
    trainer = run(pretraining=BROKEN)
    assert main(["inspect", str(Path(trainer.output_folder, FILE))]) == 0
    said = capsys.readouterr().out
    assert "step 6 (epoch 1)" in said and "contrast nan" in said and "--c" in said and "windows_of" in said


@pytest.mark.slow
def test_a_stop_between_the_step_and_the_end_of_the_epoch_loses_nothing():
    expected = read_json(Path(run(pretraining=BROKEN).output_folder, FILE))
    trainer = make_trainer(pretraining=BROKEN)
    trainer.interruption.requested = lambda: trainer.step == 8
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert not Path(trainer.output_folder, FILE).exists()  # that of the run before is gone
    resumed = make_trainer(pretraining=BROKEN, resume="checkpoint_latest.pth")
    resumed.run_training()
    assert read_json(Path(resumed.output_folder, FILE)) == expected


def test_a_run_without_such_a_step_leaves_none():
    assert not Path(run(pretraining={"epochs": 1}).output_folder, FILE).exists()
