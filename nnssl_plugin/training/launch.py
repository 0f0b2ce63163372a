"""nnU-Net's training entry point with the environment set, for schedulers, several ranks and time limits."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nnssl_plugin.errors import UserError
from nnssl_plugin.training.interruption import DEADLINE, TO_BE_CONTINUED
from nnssl_plugin.training.user_errors import words_of

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SECONDS_BETWEEN_LOOKS = 0.2
GRACE = 15.0
"""Seconds that the other ranks have to end by themselves once one has failed."""


def seconds_of(text: str) -> float:
    """Seconds of a duration such as ``90m``, ``1.5h``, ``2d`` or ``3600`` (seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise UserError(f"'{text}' is no duration.", "Write 90m, 1.5h, 2d or seconds.")
    return float(match[1]) * UNITS[match[2] or "s"]


def launch(arguments: list[str], *, search_path: str, time_limit: str | None = None, ranks: int = 1) -> int:
    """Run ``nnUNetv2_train`` with these arguments: in this process, or in one process per rank.

    Where the ranks exist already (``WORLD_SIZE`` > 1: torchrun, srun) they are joined first: NCCL on CUDA, gloo
    elsewhere. ``-num_gpus`` counts as ``ranks``: nnU-Net's own launcher serves CUDA alone and hides the exit code.

    Returns:
        the exit code.
    """
    arguments, ranks = _without_num_gpus(arguments, ranks)
    if time_limit:
        os.environ[DEADLINE] = str(time.monotonic() + seconds_of(time_limit))
    os.environ["nnUNet_extTrainer"] = search_path
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _joined_ranks(arguments):
            _train(arguments)
    elif ranks > 1:
        return run_ranks([sys.executable, "-m", "nnssl_plugin.cli.main", "train", *arguments], ranks)
    else:
        _train(arguments)
    return 0


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Run a command once per rank on this machine, with the environment that torchrun would set.

    SIGTERM and SIGINT are passed on. Where a rank fails the others, which would wait for it for ever, are ended.

    Returns:
        0 where all ranks return 0; the code of the first that failed; ``TO_BE_CONTINUED`` where they stopped early.
    """
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    processes: list[subprocess.Popen] = []
    with _passing_signals_on(processes):
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            processes.append(subprocess.Popen(command, env=os.environ | together | own))
        failed = _first_failure(processes)
        if failed is None:
            return TO_BE_CONTINUED if any(process.returncode for process in processes) else 0
        _end(processes)
    return failed if failed > 0 else 128 - failed  # a negative code is the signal that killed it


def _train(arguments: list[str]) -> None:
    from nnunetv2.run.run_training import run_training_entry  # takes seconds to import

    sys.argv = ["nnUNetv2_train", *arguments]
    try:
        run_training_entry()
    except Exception as error:
        words = words_of(error)
        if words is None:
            raise
        raise UserError(words) from error


def _without_num_gpus(arguments: list[str], ranks: int) -> tuple[list[str], int]:
    """nnU-Net's arguments without its ``-num_gpus``, which counts as ``ranks``."""
    if "-num_gpus" not in arguments:
        return arguments, ranks
    place = arguments.index("-num_gpus")
    value = arguments[place + 1] if place + 1 < len(arguments) else ""
    if not value.isdecimal():
        raise UserError(f"-num_gpus takes a number, not '{value}'.", "For example: -num_gpus 4")
    return arguments[:place] + arguments[place + 2 :], max(ranks, int(value))


@contextmanager
def _joined_ranks(arguments: list[str]) -> Iterator[None]:
    import torch  # here, as a process that only starts ranks needs none of it
    import torch.distributed as dist

    from nnssl_plugin.training.distributed import check_device

    device = arguments[arguments.index("-device") + 1] if "-device" in arguments else "cuda"
    check_device(torch.device(device))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _passing_signals_on(processes: list[subprocess.Popen]) -> Iterator[None]:
    def pass_on(number, frame) -> None:
        for process in processes:
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_failure(processes: list[subprocess.Popen]) -> int | None:
    """Wait for all; the exit code of the first that failed, as soon as there is one."""
    while True:
        codes = [process.poll() for process in processes]
        failures = [code for code in codes if code not in (None, 0, TO_BE_CONTINUED)]
        if failures:
            return failures[0]
        if None not in codes:
            return None
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _end(processes: list[subprocess.Popen]) -> None:
    """Let ranks that fail alike say so; then SIGTERM, then SIGKILL for those that wait for the others."""
    _wait(processes, 2.0)
    for process in processes:
        process.terminate()
    _wait(processes, GRACE)
    for process in processes:
        process.kill()
        process.wait()


def _wait(processes: list[subprocess.Popen], seconds: float) -> None:
    """Until all have ended, at most some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
