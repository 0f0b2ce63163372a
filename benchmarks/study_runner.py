"""Running the steps of a study: side by side, each with a log and its cost, and each only once."""

import os
import shlex
import shutil
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_steps import Step, environment, executable, training_environment
from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json

TRAININGS = ("pretraining", "tuning", "fine-tuning")
"""Stages whose steps train."""
TO_BE_CONTINUED = 75
"""Exit code of a pretraining that stopped early with a checkpoint."""


class StoppedEarly(UserError):
    """A training stopped with a checkpoint; the same command goes on."""


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    started: float


class Runner:
    """Runs steps in the study's folder; what has finished stands in ``state.json``.

    Args:
        folder: the study's folder; logs go to its ``logs``.
        device: nnU-Net's ``-device``.
        total: number of steps, for the progress bar.
    """

    def __init__(self, folder: Path, *, device: str, total: int):
        self.folder, self.device = folder, device
        self.path = folder / "state.json"
        self.state: dict[str, dict[str, Any]] = read_json(self.path) if self.path.exists() else {}
        self.bar = tqdm(total=total, unit="step")

    def run(self, steps: list[Step], *, jobs: int = 1) -> None:
        """Run the steps that have not finished yet, up to ``jobs`` side by side, on a CPU then with one thread each.

        Raises:
            UserError: where a command is missing or fails, or one finished earlier with other words.
            StoppedEarly: where a training stopped with a checkpoint.
        """
        waiting = deque(step for step in steps if not self._is_done(step))
        self.bar.update(len(steps) - len(waiting))
        one_thread = on_one_thread(min(jobs, len(waiting)), self.device)
        running: dict[int, _Running] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    job = self._start(waiting.popleft(), one_thread=one_thread)
                    running[job.process.pid] = job
                self.bar.set_description(", ".join(job.step.title for job in running.values()))
                pid, status, usage = os.wait4(-1, 0)  # resource usage: of the command and its own workers
                if pid in running:
                    self._finish(running.pop(pid), status, usage)
        finally:
            for job in running.values():
                job.process.terminate()
            for pid, job in running.items():
                self._record(job, *os.wait4(pid, 0)[1:])

    def _is_done(self, step: Step) -> bool:
        entry = self.state.get(step.title, {})
        if not entry.get("done"):
            return False
        if entry["command"] != list(step.command):
            raise UserError(
                f"Step {step.title} finished with another command: {shlex.join(entry['command'])}",
                "Choose another folder with -o.",
            )
        return True

    def _start(self, step: Step, *, one_thread: bool) -> _Running:
        variables = environment(self.folder, one_thread=one_thread)
        if step.stage in TRAININGS:
            variables |= training_environment(step.stage, device=self.device, one_thread=one_thread)
        words = executable(step, one_thread=one_thread)
        program = shutil.which(words[0], path=variables["PATH"])
        if program is None:
            raise UserError(f"{words[0]} is not installed.", "Install the package again: pip install .")
        log = self._log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(words)}\n")
            output.flush()
            process = subprocess.Popen(
                [program, *words[1:]],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        return _Running(step, process, time.monotonic())

    def _record(self, job: _Running, status: int, usage: Any) -> int:
        """Add what a command cost to the state, and return its exit code."""
        code = job.process.returncode = os.waitstatus_to_exitcode(status)
        before = self.state.get(job.step.title, {})
        self.state[job.step.title] = {
            "stage": job.step.stage,
            "command": list(job.step.command),
            "seconds": before.get("seconds", 0) + time.monotonic() - job.started,
            "cpu_seconds": before.get("cpu_seconds", 0) + usage.ru_utime + usage.ru_stime,
            "done": code == 0,
        }
        write_json(self.path, self.state)
        return code

    def _finish(self, job: _Running, status: int, usage: Any) -> None:
        code = self._record(job, status, usage)
        if code == TO_BE_CONTINUED:
            raise StoppedEarly(f"{job.step.title} stopped early with a checkpoint.", "The same command goes on.")
        if code != 0:
            lines = self._log(job.step).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(
                f"Step {job.step.title} failed with exit code {code}: {shlex.join(job.step.command)}\n"
                f"Last line of its output: {lines[-1]}",
                f"Its whole output: {self._log(job.step)}",
            )
        self.bar.update()

    def _log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.title}.log"


def on_one_thread(jobs: int, device: str) -> bool:
    """Whether each of so many commands side by side gets one thread: several on a CPU, or where the user wants it."""
    return (jobs > 1 and device == "cpu") or os.environ.get("OMP_NUM_THREADS") == "1"


def cost(state: dict[str, dict[str, Any]]) -> dict[str, float]:
    """CPU minutes of each stage and in all, and the minutes that the steps took one after another."""
    stages: dict[str, float] = {}
    for entry in state.values():
        stages[entry["stage"]] = stages.get(entry["stage"], 0) + entry["cpu_seconds"] / 60
    minutes = sum(entry["seconds"] for entry in state.values()) / 60
    return {f"cpu_minutes_{stage}": value for stage, value in stages.items()} | {
        "cpu_minutes": sum(stages.values()),
        "step_minutes": minutes,
    }
