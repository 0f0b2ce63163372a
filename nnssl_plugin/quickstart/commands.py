"""Runs one command of the pipeline: its output in a log, its interruption passed on, its failure explained."""

import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.quickstart.steps import Step
from nnssl_plugin.training.interruption import TO_BE_CONTINUED

FINAL, LATEST, BEST, PREVIOUS = (f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best", "previous"))
CHECKPOINTS = (FINAL, LATEST, BEST)
"""In the order in which nnU-Net's ``--c`` looks for them."""
SECONDS_TO_STOP = 120


class Stopped(Exception):
    """The user, or the system, has asked to stop."""


def environment_for(folder: Path, trainers: str) -> dict[str, str]:
    """The user's environment with nnU-Net's folders inside ``folder`` and without settings that break planning."""
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_n_proc_DA"}
    environment |= {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment |= {"nnUNet_extTrainer": trainers, "nnUNet_compile": "f", "nnUNet_def_n_proc": "2"}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    # more threads than free cores make training many times slower, most of all where they spin while they wait
    environment.setdefault("OMP_NUM_THREADS", str(free_cores()))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def free_cores() -> int:
    """Cores that nobody else has used over the last minute: 1 to 4, as small volumes gain nothing from more."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    return max(1, min(4, round((os.cpu_count() or 1) - load)))


def shell_line(step: Step) -> str:
    """The step as one types it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in step.environment), shlex.join(step.command)])


def continued(step: Step) -> Step:
    """The step with ``--c`` where an interrupted training left a checkpoint that can be read.

    A damaged one is removed, so that the next best is taken; ``checkpoint_latest.pth`` stays where the trainer can take
    the one before it.
    """
    for name in CHECKPOINTS if step.results is not None else ():
        path = step.results / name
        if not path.is_file():
            continue
        if _is_readable(path) or (name == LATEST and _is_readable(path.with_name(PREVIOUS))):
            return Step(step.title, step.does, (*step.command, "--c"), step.environment, step.results)
        path.unlink()
    return step


def _is_readable(path: Path) -> bool:
    from nnssl_plugin.checkpoints.format.files import read_checkpoint  # PyTorch takes seconds to import

    if not path.is_file():
        return False
    try:
        read_checkpoint(path)
    except UserError:
        return False
    return True


def run_step(
    step: Step, log: Path, *, environment: dict[str, str], say: Callable[[str], None], held: int | None = None
) -> None:
    """Run a command and append its output to ``log``.

    Args:
        step: the command.
        log: its file; the folder is made.
        environment: variables of the command, to which the step's own are added.
        say: shows one line to the user.
        held: file descriptor that the command inherits (:func:`state.locked`).

    Raises:
        UserError: where the command is missing or fails, with the last line of its output and the log's path.
        Stopped: on Ctrl-C or SIGTERM, after the command has ended, too.
    """
    executable = shutil.which(step.command[0], path=environment["PATH"])
    if executable is None:
        raise UserError(f"{step.command[0]} is not installed.", "Install the package again: pip install .")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [executable, *step.command[1:]],
            env=environment | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, through us
            pass_fds=() if held is None else (held,),
        )
        code = _wait(process, say)
    if code == TO_BE_CONTINUED:
        raise Stopped
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(
            f"Step '{step.title}' failed with exit code {code}: {shell_line(step)}\n"
            f"Last line of its output: {lines[-1] if lines else '(none)'}",
            f"Its whole output: {log}",
        )


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C, so that a scheduler's stop leaves a state to go on from."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may catch signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _wait(process: subprocess.Popen, say: Callable[[str], None]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:
        say("  stopping: a training first writes its state (Ctrl-C again stops at once)")
        # not SIGINT, which commands ignore where a shell script started us in the background
        _signal_all(process, signal.SIGTERM)
    try:
        process.wait(timeout=SECONDS_TO_STOP)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        _signal_all(process, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
    raise Stopped


def _signal_all(process: subprocess.Popen, number: int) -> None:
    """To the command and its workers, as a terminal does."""
    if os.name != "posix":
        process.terminate()
    elif process.poll() is None:
        os.killpg(process.pid, number)
