"""Running, stopping and going on: with small scripts in the place of nnU-Net's commands."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.quickstart import run as pipeline
from nnssl_plugin.quickstart.commands import Stopped, continued, environment_for, run_step, shell_line
from nnssl_plugin.quickstart.scans import Selection, Setting
from nnssl_plugin.quickstart.state import FILE, State, locked
from nnssl_plugin.quickstart.steps import PRETRAINING, Step, titles
from nnssl_plugin.training.interruption import TO_BE_CONTINUED

PHANTOMS = Setting()


def environment():
    return environment_for(Path("quick"), "trainers")


def step(code, title="hello", **more):
    return Step(title, "does it", (sys.executable, "-c", code), **more)


def silent(line):
    pass


# ------------------------------------------------------------------ one command


def test_the_output_of_a_command_is_kept_and_a_second_attempt_adds_to_it(tmp_path):
    code = "import os; print(os.environ['nnUNet_n_proc_DA'], os.environ['nnUNet_extTrainer'])"
    for _ in range(2):
        run_step(
            step(code, environment=(("nnUNet_n_proc_DA", "0"),)),
            tmp_path / "logs" / "a.log",
            environment=environment(),
            say=silent,
        )
    assert (tmp_path / "logs" / "a.log").read_text().split() == ["0", "trainers"] * 2


def test_the_shown_line_is_what_a_shell_takes():
    line = shell_line(Step("x", "", ("train", "a folder/b"), environment=(("A", "0"),)))
    assert shlex.split(line) == ["A=0", "train", "a folder/b"]


def test_a_failing_step_names_the_command_and_the_log(tmp_path):
    broken = step("print('before'); raise SystemExit('it is broken')", "broken")
    with pytest.raises(UserError) as error:
        run_step(broken, tmp_path / "b.log", environment=environment(), say=silent)
    assert "raise SystemExit" in error.value.problem and "it is broken" in error.value.problem
    assert str(tmp_path / "b.log") in error.value.remedy
    assert "before" in (tmp_path / "b.log").read_text()


def test_a_missing_command_is_named(tmp_path):
    with pytest.raises(UserError, match="nnUNetv2_no_such"):
        run_step(Step("x", "", ("nnUNetv2_no_such",)), tmp_path / "c.log", environment=environment(), say=silent)


def test_a_training_that_stopped_early_stops_the_pipeline(tmp_path):
    with pytest.raises(Stopped):
        run_step(
            step(f"raise SystemExit({TO_BE_CONTINUED})"), tmp_path / "d.log", environment=environment(), say=silent
        )


def test_a_value_that_breaks_planning_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert "nnUNet_n_proc_DA" not in environment()


@pytest.mark.parametrize(("cores", "load", "threads"), [(2, 0.1, 2), (2, 7.5, 1), (16, 1.0, 4), (4, 1.2, 3)])
def test_only_free_cores_are_used(monkeypatch, cores, load, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    assert environment()["OMP_NUM_THREADS"] == str(threads)


# ------------------------------------------------------------------ going on


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    training = step("", results=tmp_path)
    assert continued(training) == training
    torch.save({"epoch": 1}, tmp_path / "checkpoint_best.pth")
    assert continued(training).command == (*training.command, "--c")


def test_a_damaged_checkpoint_makes_way_for_the_next_best(tmp_path):
    training = step("", results=tmp_path)
    (tmp_path / "checkpoint_latest.pth").write_bytes(b"half of a")
    assert continued(training) == training
    assert not (tmp_path / "checkpoint_latest.pth").exists()


def test_a_damaged_checkpoint_stays_where_the_trainer_can_take_the_one_before(tmp_path):
    training = step("", results=tmp_path)
    (tmp_path / "checkpoint_latest.pth").write_bytes(b"half of a")
    torch.save({"epoch": 1}, tmp_path / "checkpoint_previous.pth")
    assert continued(training).command == (*training.command, "--c")
    assert (tmp_path / "checkpoint_latest.pth").exists()


def test_seconds_of_interrupted_attempts_add_up(tmp_path):
    state = State(tmp_path, PHANTOMS)
    state.record("plan", seconds=3, done=False, command="a")
    assert not state.is_done("plan")
    state.record("plan", seconds=4, done=True, command="a --c")
    again = State(tmp_path, PHANTOMS)
    assert again.seconds == {"plan": 7} and again.commands == {"plan": "a --c"}


def test_a_folder_of_another_setting_is_refused(tmp_path):
    State(tmp_path, Setting(images="/a"))
    with pytest.raises(UserError, match="begun with --images /a, this run has --images /b"):
        State(tmp_path, Setting(images="/b"))


def test_a_damaged_state_is_refused_by_name(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        State(tmp_path, PHANTOMS)


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main(["quickstart", "-o", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"nnssl_plugin quickstart: {tmp_path} is not empty") and "mine.txt" in first
    assert second.startswith("Choose another folder")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_is_held_by_the_command_even_when_its_quickstart_is_gone(tmp_path):
    with locked(tmp_path) as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held,))
    try:
        with pytest.raises(UserError, match="works in"), locked(tmp_path):
            pass
    finally:
        child.communicate(b"\n")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (Setting(labels="/l"), "needs --images"),
        (Setting(images="{tmp}"), "inside the folder"),
        (Setting(images="/l", labels="/l"), "same folder"),
    ],
)
def test_folders_that_cannot_be_meant_are_refused(tmp_path, setting, problem):
    setting = Setting(setting.images and setting.images.format(tmp=tmp_path), setting.labels)
    with pytest.raises(UserError, match=problem):
        pipeline.run_quickstart(tmp_path / "out", setting, device="cpu", trainers="", say=silent)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ the whole pipeline, with small scripts as commands


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A pipeline of scripts that leave a file each; ``pretrain`` fails while ``tmp_path/fail`` exists."""

    def steps(*names):
        code = (
            "import pathlib, sys; p = pathlib.Path({!r}); p.open('a').write('x'); "
            "sys.exit((p.parent / 'fail').exists())"
        )
        return [step(code.format(str(tmp_path / name)), name) for name in names]

    def scans(folder, setting):
        write_json(folder / "nnUNet_preprocessed" / PRETRAINING / "nnUNetPlans.json", {})
        return Selection("MR", ("a",), notes=("cut",))

    monkeypatch.setattr(pipeline, "write_scans", scans)
    monkeypatch.setattr(pipeline, "planning_steps", lambda folder, modality: steps("prepare", "plan", "caption"))
    monkeypatch.setattr(pipeline, "pretraining_steps", lambda folder, plan, device: steps("shrink", "pretrain"))
    monkeypatch.setattr(pipeline, "write_report", lambda folder, state: (folder / "report.html").write_text("done"))
    setting = Setting(images=str(tmp_path / "images"))

    def whole():
        said = []
        report = pipeline.run_quickstart(tmp_path / "out", setting, device="cpu", trainers="trainers", say=said.append)
        return report, said

    return whole


def test_steps_are_counted_timed_and_noted(short, tmp_path):
    report, said = short()
    assert report.read_text() == "done"
    announced = [line.split(":")[0] for line in said if line.startswith("[")]
    assert announced == [f"[{i}/7] {title}" for i, title in enumerate(titles(labelled=False), 1)]
    assert "minutes" in said[0] and "GiB free" in said[0]
    assert sum("done in" in line for line in said) == 7
    assert "  note: cut" in said
    steps = read_json(tmp_path / "out" / FILE)["steps"]
    assert all(entry["done"] and entry["seconds"] >= 0 for entry in steps.values()) and len(steps) == 7
    assert (tmp_path / "out" / "logs" / "06-pretrain.log").exists()


def test_after_a_failure_the_same_call_goes_on_where_it_was(short, tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="Step 'prepare' failed"):
        short()
    (tmp_path / "fail").unlink()
    short()
    assert {name: (tmp_path / name).read_text() for name in ("prepare", "plan", "pretrain")} == {
        "prepare": "xx",
        "plan": "x",
        "pretrain": "x",
    }
    _, said = short()
    assert "done already" in said[0]
    assert (tmp_path / "plan").read_text() == "x"


def test_interrupting_stops_the_command_and_says_how_to_go_on(tmp_path):
    """As a terminal does it: Ctrl-C to the process, whose child is then told once and given time to write."""
    child = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): pathlib.Path('told').open('a').write('x'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path('ready').touch(); time.sleep(60)"
    )
    parent = (
        "import sys; from pathlib import Path\n"
        "from nnssl_plugin.quickstart import commands; from nnssl_plugin.quickstart.steps import Step\n"
        f"step = Step('x', '', (sys.executable, '-c', {child!r}))\n"
        "try:\n"
        "    with commands.termination_as_interrupt():\n"
        "        environment = commands.environment_for(Path('.'), '')\n"
        "        commands.run_step(step, Path('log'), environment=environment, say=print)\n"
        "except commands.Stopped: print('stopped')"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / "ready").unlink(missing_ok=True)
        (tmp_path / "told").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=30)
        assert output.splitlines()[-1] == "stopped" and (tmp_path / "told").read_text() == "x"


def test_the_command_line_ends_with_the_line_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(pipeline, "run_quickstart", stopped)
    monkeypatch.setattr(sys, "argv", ["nnssl_plugin", "quickstart", "--output", "a folder"])
    assert main(["quickstart", "--output", "a folder"]) == TO_BE_CONTINUED
    assert capsys.readouterr().out.strip().endswith("nnssl_plugin quickstart --output 'a folder'")
