"""Work in other processes: order, and items that end theirs."""

import os

import pytest

from nnssl_plugin.intake.workers import in_processes

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
