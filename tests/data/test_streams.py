"""Streams: what comes in which order, from this process or from workers; what workers import, and when they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from worker_modules import ImportedModules

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases
from nnssl_plugin.data.streams import METHOD, open_streams

CASES = [f"case_{i:02d}" for i in range(6)]
EPOCHS = [(range(3, 5), range(2)), (range(5, 9), range(2))]

KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from nnssl_plugin.data.streams import open_streams
from worker_modules import ImportedModules

training, validation = open_streams(ImportedModules(range(99)), ImportedModules(range(9)), [(range(99), ())], workers=2)
found = [next(training)["processes"] for _ in range(40)]
print(*set().union(*found) - {{os.getpid()}}, flush=True)
os.kill(os.getpid(), 9)
"""

SIGNALLED = """
import os, signal, time
from multiprocessing import forkserver
from nnssl_plugin.data.streams import prepare_workers

prepare_workers(1)
server = forkserver._forkserver._forkserver_pid
os.kill(server, signal.SIGTERM)
os.kill(server, signal.SIGINT)
time.sleep(0.5)
print(os.waitpid(server, os.WNOHANG))
"""


@pytest.fixture
def batches(nnunet_environment):
    write_fake_dataset(channels=2)
    cases = Cases(Path(os.environ["nnUNet_preprocessed"], NAME, "fake_data"), CASES, transpose_forward=(0, 1, 2))
    available = {case: np.array([True, True]) for case in CASES}

    def make(stream, **needs):
        return StepBatches(
            cases, Needs(**needs), patch_size=(8, 8, 8), batch_size=2, available=available, stream=stream
        )

    return make


def numbers(stream, count):
    return [next(stream) for _ in range(count)]


def test_streams_of_this_process_are_read_in_any_order():
    training, validation = open_streams(range(9), range(10, 12), EPOCHS, workers=0)
    assert numbers(validation, 3) == [10, 11, 10] and numbers(training, 6) == [3, 4, 5, 6, 7, 8]
    with pytest.raises(StopIteration):
        next(training)


def test_the_first_batch_is_told_once():
    lines = []
    training, validation = open_streams(range(9), range(2), EPOCHS, workers=0, tell=lines.append)
    numbers(training, 3), numbers(validation, 2)
    assert len(lines) == 1 and lines[0].startswith("First batch after 0.")
    assert training.waited > 0
    training.close()
    with pytest.raises(ValueError, match="closed"):
        next(training)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({METHOD, "spawn"}))
def test_one_pool_brings_what_this_process_would_through_signals_and_imports_neither_trainers_nor_compiler(
    batches, monkeypatch, method
):
    monkeypatch.setattr("nnssl_plugin.data.streams.METHOD", method)
    sources = batches((1, 0)), batches((1, 1), window="whole")
    training, validation = open_streams(*map(ImportedModules, sources), EPOCHS, workers=2)
    first = numbers(training, 2), numbers(validation, 1)  # in the middle of the validation, the training goes on
    others = set().union(*(each["processes"] for each in first[0] + first[1])) - {os.getpid()}
    assert others
    for process in others:  # of a scheduler; the server's, too
        os.kill(process, signal.SIGTERM)
    rest = numbers(training, 4), numbers(validation, 3)
    for part, source, steps in ((0, sources[0], [*range(3, 9)]), (1, sources[1], [0, 1, 0, 1])):
        found = first[part] + rest[part]
        assert [each["step"] for each in found] == steps
        assert all(same(value, source[each["step"]][key]) for each in found for key, value in each["batch"].items())
        assert not any(each["heavy"] for each in found)
    for stream in (training, validation):
        with pytest.raises(StopIteration):
            next(stream)


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.slow
@pytest.mark.skipif(METHOD != "forkserver", reason="there is no server")
def test_the_first_server_of_a_process_outlives_signals():
    run = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True)
    assert run.stdout.strip() == "(0, 0)", run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_workers_of_a_killed_trainer_end(repository):
    run = subprocess.run(
        [sys.executable, "-c", KILLED.format(tests=str(repository / "tests"))], capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    processes = [int(number) for number in run.stdout.split()]
    assert processes
    until = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, processes))


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
