"""The command that sets the environment and hands over to nnU-Net."""

import os
import signal
import sys
import threading
import time

import pytest

from nnssl_plugin.cli import main as command
from nnssl_plugin.cli.env import search_path
from nnssl_plugin.errors import UserError
from nnssl_plugin.training import launch
from nnssl_plugin.training.interruption import DEADLINE


@pytest.mark.parametrize("text, seconds", [("90m", 5400), ("1.5h", 5400), ("2d", 172800), ("30", 30), ("30s", 30)])
def test_durations(text, seconds):
    assert launch.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1h30m", "-5m", "soon"])
def test_what_is_no_duration_is_said(text):
    with pytest.raises(UserError, match="no duration"):
        launch.seconds_of(text)


def test_arguments_reach_nnunet_unchanged_and_the_environment_is_set(monkeypatch):
    import nnunetv2.run.run_training as nnunet

    seen = {}
    monkeypatch.setattr(nnunet, "run_training_entry", lambda: seen.update(arguments=sys.argv, env=dict(os.environ)))
    monkeypatch.setattr(sys, "argv", ["x"])
    for name in (DEADLINE, "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "0")
    arguments = ["501", "3d_fullres", "all", "-tr", "Med3DInsightPretrainer", "-device", "cpu", "--c"]
    assert command.main(["train", *arguments, "--time-limit", "2h"]) == 0
    assert seen["arguments"] == ["nnUNetv2_train", *arguments]
    assert seen["env"]["nnUNet_extTrainer"] == "0" + os.pathsep + search_path().split(os.pathsep)[-1]
    assert float(seen["env"][DEADLINE]) - time.monotonic() == pytest.approx(7200, abs=60)


def test_a_users_error_inside_another_error_is_said_in_words(monkeypatch, capsys):
    import nnunetv2.run.run_training as nnunet

    def failing():
        raise RuntimeError("nnU-Net could not go on") from UserError("It broke.", "Mend it.")

    monkeypatch.setattr(nnunet, "run_training_entry", failing)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert command.main(["train", "501"]) == 2
    assert capsys.readouterr().err.splitlines() == ["nnssl_plugin train: It broke.", "Mend it."]


RANK = "import os, sys, time; rank = int(os.environ['RANK']); "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("assert os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == str(rank)", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(2)", 2),
        ("time.sleep(0 if rank else 60); sys.exit(2)", 2),
        ("time.sleep(60 if rank else 0); os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_ranks_exit_code_is_the_launchers(monkeypatch, program, code):
    """A rank that fails ends the others, which would wait for it for ever."""
    started = time.monotonic()
    assert launch.run_ranks([sys.executable, "-c", RANK + program], 2) == code
    assert time.monotonic() - started < 50


@pytest.mark.slow
def test_ranks_that_cannot_be_asked_are_killed(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60 if rank else 0.5); sys.exit(3)"
    assert launch.run_ranks([sys.executable, "-c", RANK + stubborn], 2) == 3


def test_signals_are_passed_on_to_the_ranks(tmp_path):
    waiting = (
        "import signal; signal.signal(15, lambda *given: sys.exit(75)); "
        f"open(r'{tmp_path}/' + str(rank), 'w').close(); time.sleep(60)"
    )

    def ask():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert launch.run_ranks([sys.executable, "-c", RANK + waiting], 2) == 75


@pytest.mark.parametrize(("given", "ranks"), [(["--ranks", "3"], 3), (["-num_gpus", "4"], 4)])
def test_ranks_are_started_by_the_command_itself(monkeypatch, given, ranks):
    monkeypatch.setattr(launch, "run_ranks", lambda *arguments: seen.append(arguments) or 75)
    monkeypatch.setenv("nnUNet_extTrainer", "0")
    seen = []
    assert command.main(["train", "501", "3d_fullres", "all", *given, "--c"]) == 75
    ((words, number),) = seen
    assert number == ranks and words[3:] == ["train", "501", "3d_fullres", "all", "--c"]


def test_a_wrong_number_of_gpus_is_said():
    with pytest.raises(UserError, match="-num_gpus takes a number, not 'two'"):
        launch.launch(["501", "-num_gpus", "two"], search_path="x")


def test_unknown_flags_of_other_verbs_are_errors(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["env", "--nonsense"])
    assert stopped.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_user_errors_become_a_few_lines_and_exit_code_2(monkeypatch, capsys):
    import nnssl_plugin.cli.env as verb

    def failing(args):
        raise UserError("It broke.", "Mend it.")

    monkeypatch.setattr(verb, "run", failing)
    assert command.main(["env"]) == 2
    assert capsys.readouterr().err.splitlines() == ["nnssl_plugin env: It broke.", "Mend it."]


STARTS = {
    "bash": 'export nnUNet_extTrainer="',
    "fish": 'set -gx nnUNet_extTrainer "',
    "powershell": '$env:nnUNet_extTrainer = "',
    "cmd": "set nnUNet_extTrainer=",
}


@pytest.mark.parametrize("shell, start", STARTS.items())
def test_env_prints_the_line_of_each_shell(shell, start, capsys):
    assert command.main(["env", "--shell", shell]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(start) and "pretrain_trainers" in line


def test_search_path_appends_once(monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    own = search_path()
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/other", own]))
    assert search_path() == os.pathsep.join(["/other", own])
    monkeypatch.setenv("nnUNet_extTrainer", "/other")
    assert search_path() == os.pathsep.join(["/other", own])
