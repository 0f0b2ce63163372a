"""The lock file: who is refused, who is told, and which locks are taken over."""

import json
import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.io import lock
from nnssl_plugin.io.lock import locked


@contextmanager
def another_process_holds(path: Path):
    """A forked process that holds the lock until the end of the block, or until it is killed; its process id."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path):
            os.write(tell, b"x")
            signal.pause()
    os.read(ready, 1)
    try:
        yield child
    finally:
        end(child)
        os.close(ready)
        os.close(tell)


def end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_the_second_is_refused_and_told_who_holds_it(tmp_path):
    path = tmp_path / ".lock"
    with another_process_holds(path) as child, pytest.raises(UserError) as refused, locked(path):
        raise AssertionError("two processes hold the lock")
    assert (
        f"Process {child} on {socket.gethostname()}" in refused.value.problem and " since 20" in refused.value.problem
    )
    assert f"kill {child}" in refused.value.remedy and path.is_file()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    path = tmp_path / ".lock"
    with another_process_holds(path) as child:
        end(child)
        assert json.loads(path.read_text())["pid"] == child
        with locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_of_another_host_is_refused_with_the_file_to_delete(tmp_path):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "since": "2026-01-01 12:00:00+00:00"}))
    with pytest.raises(UserError, match=r"on elsewhere works in .* since 2026") as refused, locked(path):
        raise AssertionError("the other host's lock was taken")
    assert f"delete {path}" in refused.value.remedy and path.is_file()


def test_without_locks_of_the_file_system_the_process_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_kernel_lock", lambda descriptor: None)
    path = tmp_path / ".lock"
    with another_process_holds(path) as child:
        with pytest.raises(UserError, match=f"Process {child}"), locked(path):
            raise AssertionError("two processes hold the lock")
        end(child)
        with locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 3}'])
def test_a_lock_that_a_crash_left_half_written_is_taken_over(tmp_path, content):
    path = tmp_path / ".lock"
    path.write_text(content)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_process_may_take_its_own_lock_again_and_an_error_releases_it(tmp_path):
    path = tmp_path / ".lock"
    with pytest.raises(KeyError), locked(path), locked(path):
        raise KeyError
    assert not path.exists()


def test_workers_that_outlive_their_process_do_not_hold_its_lock(tmp_path):
    """nnU-Net's forked workers can survive a SIGKILL of the training."""
    path = tmp_path / ".lock"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path):
            worker = os.fork()
            if worker == 0:
                signal.pause()
            os.write(tell, str(worker).encode())
            signal.pause()
    worker = int(os.read(ready, 16))
    end(child)
    try:
        with locked(path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
