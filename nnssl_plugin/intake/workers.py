"""Work in other processes, where a file that ends the process that reads it ends nothing else."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]
"""Of a worker: what it does with every item."""


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int, *, killed: Callable[[Item], Result]
) -> Iterator[Result]:
    """The result for every item, in their order.

    Args:
        work: what :mod:`pickle` takes, for example a function of a module.
        items: what to work on.
        processes: how many; 1 works in this process, which a reader that crashes then ends.
        killed: the result for an item that ends its process.
    """
    return map(work, items) if processes <= 1 else ahead_in_processes(work, items, processes, killed=killed)


def ahead_in_processes(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    *,
    killed: Callable[[Item], Result],
    ahead: int | None = None,
) -> Iterator[Result]:
    """The result for every item, in their order, always by other processes, which work ahead while this one does
    something else; what is finished waits in memory.

    Where a process is killed, what it may have worked on is done again, each item in a process of its own.

    Args:
        work: see :func:`in_processes`; it is sent to every process once.
        items: what to work on.
        processes: how many, 1 or more.
        killed: the result for an item that ends its process.
        ahead: items that are worked on or wait; None: two for each process.
    """
    items, ahead = list(items), ahead or 2 * processes
    while items:
        done = 0
        try:
            with _pool(work, min(processes, len(items))) as pool:
                for result in _in_order(pool, items, ahead):
                    yield result
                    done += 1
            return
        except BrokenProcessPool:
            suspects, items = items[done : done + ahead], items[done + ahead :]
            yield from (_apart(work, item, killed) for item in suspects)


def _in_order(pool: ProcessPoolExecutor, items: Sequence[Item], ahead: int) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(_do, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _apart(work: Callable[[Item], Result], item: Item, killed: Callable[[Item], Result]) -> Result:
    try:
        with _pool(work, 1) as pool:
            return pool.submit(_do, item).result()
    except BrokenProcessPool:
        return killed(item)


@contextmanager
def _pool(work: Callable, processes: int) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start, initargs=(work,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a process takes a second to end


def _start(work: Callable) -> None:
    """Remember what to do, and end with the process that wants it, even where that is killed."""
    global _work
    _work = work
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
