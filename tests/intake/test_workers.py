"""Work in other processes: order, and items that end theirs."""

import os
import time
from pathlib import Path

import pytest

from nnssl_plugin.intake.workers import ahead_in_processes, in_processes

CRASH = "__import__('os').kill(__import__('os').getpid(), __import__('signal').SIGSEGV)"
"""Ends the process that evaluates it, as a reader in foreign code may."""


def test_one_process_is_this_one_and_results_come_one_by_one():
    pids = in_processes(lambda item: (os.getpid(), item), [1, 2], 1, killed=str)
    assert next(pids) == (os.getpid(), 1) and list(pids) == [(os.getpid(), 2)]


@pytest.mark.slow
@pytest.mark.parametrize("items", [[CRASH], ["1", "2", CRASH, "4", "5", CRASH, "7"]])
def test_an_item_that_ends_its_process_ends_nothing_else(items):
    expected = ["killed" if item == CRASH else int(item) for item in items]
    assert list(in_processes(eval, items, 2, killed=lambda _: "killed")) == expected


def test_of_nothing_there_is_nothing():
    assert list(in_processes(eval, [], 2, killed=str)) == []


@pytest.mark.slow
def test_as_many_items_as_asked_for_are_worked_on_ahead(tmp_path):
    files = [tmp_path / str(number) for number in range(8)]
    results = ahead_in_processes(Path.touch, files, 1, killed=str, ahead=5)
    next(results)
    until = time.monotonic() + 20
    while not files[4].exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    assert [file.exists() for file in files] == [True] * 5 + [False] * 3
    assert list(results) == [None] * 7


@pytest.mark.slow
def test_an_item_far_ahead_that_ends_its_process_costs_no_other():
    items = ["1", "2", "3", "4", CRASH, "6", "7", "8", "9"]
    expected = ["killed" if item == CRASH else int(item) for item in items]
    assert list(ahead_in_processes(eval, items, 1, killed=lambda _: "killed", ahead=5)) == expected
