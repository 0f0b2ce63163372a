"""Asking a run to stop: signals, their repetitions, and the clock of the time limit."""

import os
import signal
import time

import pytest

from nnssl_plugin.training import interruption
from nnssl_plugin.training.interruption import DEADLINE, Interruption


@pytest.fixture
def watched():
    subject = Interruption()
    subject.watch()
    yield subject
    subject.release()


def test_one_request_may_come_as_several_signals(watched):
    """A scheduler signals every process of a job, and the launcher among them passes its own on."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert watched.requested() and watched.reason == "SIGTERM"


def test_a_second_request_acts_as_it_would_have(watched, monkeypatch):
    monkeypatch.setattr(interruption, "SECONDS_OF_ONE_REQUEST", 0.0)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    subject = Interruption()
    subject.watch()
    subject.watch()
    assert signal.getsignal(signal.SIGTERM) != before
    subject.release()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_limit_does_not_follow_the_wall_clock(monkeypatch):
    monkeypatch.setenv(DEADLINE, str(time.monotonic() + 1000))
    monkeypatch.setattr(time, "time", lambda: 1e12)
    subject = Interruption()
    assert not subject.requested()
    monkeypatch.setenv(DEADLINE, str(time.monotonic() - 1))
    assert subject.requested() and subject.reason == "the time limit"


def test_a_child_reads_the_same_clock():
    """The limit is handed to other processes as a number of this clock."""
    ready, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, str(time.monotonic()).encode())
        os._exit(0)
    assert abs(float(os.read(ready, 64)) - time.monotonic()) < 60
