"""Errors under nnU-Net's own commands: words and exit code 2, other errors as ever."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_dataset import write_fake_dataset

from nnssl_plugin.errors import UserError
from nnssl_plugin.training.user_errors import end_in_words, words_of


@pytest.fixture
def hook(monkeypatch):
    """The hook over one that remembers what reached it."""
    reached = []
    monkeypatch.setattr(sys, "excepthook", lambda *given: reached.append(given))
    end_in_words()
    end_in_words()
    return sys.excepthook, reached


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error", [UserError("It broke.", "Mend it."), chained(RuntimeError(), UserError("It broke.\nMend it."))]
)
def test_a_users_error_ends_in_words(hook, capsys, error):
    with pytest.raises(SystemExit) as ended:
        hook[0](type(error), error, None)
    assert ended.value.code == 2 and capsys.readouterr().err == "It broke.\nMend it.\n" and not hook[1]


def test_other_errors_and_ctrl_c_reach_the_former_hook(hook, capsys):
    for error in (ValueError("x"), KeyboardInterrupt()):
        hook[0](type(error), error, None)
    assert [given[0] for given in hook[1]] == [ValueError, KeyboardInterrupt] and capsys.readouterr().err == ""


class Failing(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise UserError("The case is broken.", "Mend it.")

    def __len__(self):
        return 1


def test_an_error_of_a_worker_keeps_its_words_alone():
    with pytest.raises(UserError) as raised:
        next(iter(torch.utils.data.DataLoader(Failing(), num_workers=1)))
    assert "Traceback" in str(raised.value)
    assert words_of(raised.value) == "The case is broken.\nMend it."


@pytest.mark.slow
def test_nnunets_command_says_what_a_plan_lacks(nnunet_environment, tmp_path):
    write_fake_dataset()
    command = shutil.which("nnUNetv2_train", path=str(Path(sys.executable).parent))
    ended = subprocess.run(
        [command, "901", "3d_fullres", "all", "-tr", "PretrainedSegmentationTrainer", "-device", "cpu"],
        cwd=tmp_path,
        env=nnunet_environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "no finetuning block" in ended.stderr and "nnssl_plugin adapt" in ended.stderr
