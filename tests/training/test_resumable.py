"""Checkpoints that survive: the one before, damage, full disks, kills in mid-write, and two runs at once."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from pretraining_harness import assert_same, make_trainer, run, state_of

from nnssl_plugin.checkpoints.format import files
from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.lock import locked
from nnssl_plugin.training.interruption import TO_BE_CONTINUED
from nnssl_plugin.training.resumable import BEST, FINAL, LATEST, LOCK, PREVIOUS, RESUME_STATE

SHORT = {"epochs": 3, "iterations_per_epoch": 2, "validation_iterations": 1}


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    """No workers and no figures."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def stopped_after(step: int, **arguments):
    """A short run that was asked to stop after a step; its output folder."""
    trainer = make_trainer(pretraining=SHORT, **arguments)
    trainer.interruption.requested = lambda: trainer.step >= step
    with pytest.raises(SystemExit) as ended:
        trainer.run_training()
    assert ended.value.code == TO_BE_CONTINUED
    return Path(trainer.output_folder)


def resumed(name: str = LATEST):
    return make_trainer(pretraining=SHORT, resume=name)


def step_of(path: Path) -> int:
    return read_checkpoint(path)[RESUME_STATE]["step"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def exchange_a_weight(path: Path) -> None:
    """A file that reads well and holds other weights than were written."""
    content = read_checkpoint(path)
    next(iter(content["network_weights"].values())).view(-1)[0] += 1e-3
    save_checkpoint(content, path)


def test_the_one_before_is_kept_until_the_end():
    folder = stopped_after(5)
    assert (step_of(folder / LATEST), step_of(folder / PREVIOUS)) == (5, 4)
    resumed().run_training()
    assert sorted(p.name for p in folder.glob("*.pth")) == [FINAL] and not (folder / LOCK).exists()


@pytest.mark.parametrize("damage", [truncate, empty, exchange_a_weight])
def test_a_damaged_last_checkpoint_is_told_and_the_one_before_is_taken(damage):
    reference = state_of(run(pretraining=SHORT))
    folder = stopped_after(5)
    damage(folder / LATEST)
    trainer = resumed()
    assert trainer.step == 4
    said = Path(trainer.log_file).read_text()
    assert "damaged" in said and f"Going on from the one before: {folder / PREVIOUS}" in said
    trainer.run_training()
    assert_same(reference, state_of(trainer))


def test_a_damaged_checkpoint_does_not_replace_the_one_before():
    folder = stopped_after(3)
    truncate(folder / LATEST)
    trainer = resumed()
    assert trainer.step == 2
    trainer.interruption.requested = lambda: True
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert (step_of(folder / LATEST), step_of(folder / PREVIOUS)) == (3, 2)


def test_damage_without_one_before_is_an_error():
    folder = stopped_after(1)
    truncate(folder / LATEST)
    with pytest.raises(UserError, match="truncated, damaged"):
        resumed()
    exchange_a_weight(stopped_after(1) / LATEST)
    with pytest.raises(UserError, match="SHA-256"):
        resumed()


def test_a_new_run_does_not_fall_back_to_one_that_was_there():
    stopped_after(5)
    folder = stopped_after(1)
    assert (folder / LATEST).is_file() and not (folder / PREVIOUS).exists()


def test_checkpoints_of_earlier_versions_go_on():
    reference = state_of(run(pretraining=SHORT))
    folder = stopped_after(3)
    content = read_checkpoint(folder / LATEST)
    del content[RESUME_STATE]
    save_checkpoint(content, folder / LATEST)
    trainer = resumed()
    assert trainer.step == 3
    trainer.run_training()
    assert_same(reference, state_of(trainer))


def test_other_steps_per_epoch_are_refused():
    stopped_after(5)
    with pytest.raises(UserError, match=r"step 5, in epoch 2; .* epochs of 9 steps"):
        make_trainer(pretraining=SHORT | {"iterations_per_epoch": 9}, resume=LATEST)


def fill_the_disk(monkeypatch, trainer, step: int) -> None:
    """From a step on, ``torch.save`` writes a part and then finds the disk full."""
    save = torch.save

    def full(content, file):
        if trainer.step < step:
            return save(content, file)
        file.write(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.torch, "save", full)


def test_a_full_disk_ends_in_words_and_keeps_what_was_written(monkeypatch):
    reference = state_of(run(pretraining=SHORT))
    trainer = make_trainer(pretraining=SHORT)
    folder = Path(trainer.output_folder)
    with monkeypatch.context() as patched:
        fill_the_disk(patched, trainer, 5)
        with pytest.raises(UserError, match="No space left on device"):
            trainer.run_training()
    (folder / FINAL).unlink()  # of the reference
    assert (step_of(folder / LATEST), step_of(folder / PREVIOUS)) == (4, 2)
    assert not list(folder.glob(".*"))
    trainer = resumed()
    trainer.run_training()
    assert_same(reference, state_of(trainer))


def test_a_file_that_the_system_cuts_off_is_an_error_in_words(tmp_path):
    """A real limit of the system, as a full disk acts on the writer of PyTorch."""
    save_checkpoint({"a": 1}, tmp_path / "a.pth")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(UserError, match=r"a\.pth: File too large"):
            save_checkpoint({"a": torch.zeros(1 << 20)}, tmp_path / "a.pth", keep_as=tmp_path / "b.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.pth"] and read_checkpoint(tmp_path / "a.pth") == {
        "a": 1
    }


def test_a_read_only_folder_is_an_error_in_words(monkeypatch):
    def refuse(*given, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/there/fold_all")

    with monkeypatch.context() as patched:
        patched.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.maybe_mkdir_p", refuse)
        with pytest.raises(UserError, match="/there/fold_all: Read-only file system"):
            make_trainer()
    folder = stopped_after(3)
    trainer = resumed()
    monkeypatch.setattr("nnssl_plugin.io.files.tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        trainer.run_training()
    assert step_of(folder / LATEST) == 3


def test_a_kill_in_the_middle_of_a_write_leaves_the_last_one_and_no_rubbish(monkeypatch):
    folder = stopped_after(3)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files.torch, "save", lambda content, file: _write_and_die(file))
        save_checkpoint({"a": 1}, folder / LATEST, keep_as=folder / PREVIOUS)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(folder.glob(f".{LATEST}.*"))) == 1
    trainer = resumed()
    assert trainer.step == 3
    trainer.run_training()
    assert not list(folder.glob(".*"))


def _write_and_die(file) -> None:
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing():
    folder = stopped_after(3)
    trainer = resumed()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder / LOCK):
            os.write(tell, b"x")
            signal.pause()
    os.read(ready, 1)
    half = folder / f".{LATEST}.abcdefgh.pth"
    half.touch()  # the other run is writing it
    try:
        with pytest.raises(UserError, match=f"Process {child} on"):
            trainer.run_training()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert half.exists() and trainer.step == 3
    trainer.run_training()  # the lock of the dead process is taken over
    assert not half.exists() and (folder / FINAL).is_file()


def test_signals_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(pretraining=SHORT)
    trainer.train_step = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run_training()
    assert signal.getsignal(signal.SIGTERM) == before and not Path(trainer.output_folder, LOCK).exists()


def test_without_a_gpu_the_processor_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from toy_method import ToyPretrainer

    with pytest.raises(UserError) as error:
        ToyPretrainer({}, "3d_fullres", 0, {}, torch.device("cuda"))
    assert "-device cpu" in error.value.remedy
    assert not any(Path(os.environ["nnUNet_results"]).iterdir())


def test_a_rank_without_a_gpu_is_told(monkeypatch):
    from nnssl_plugin.training.distributed import check_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"Rank 2 .* finds 2"):
        check_device(torch.device("cuda"))
    check_device(torch.device("cpu"))


def test_disabled_checkpoints_are_not_written():
    trainer = make_trainer(pretraining=SHORT)
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("*.pth")) and not Path(trainer.output_folder, BEST).exists()
