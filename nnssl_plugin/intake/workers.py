"""Work in other processes, where a file that ends the process that reads it ends nothing else."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int, *, killed: Callable[[Item], Result]
) -> Iterator[Result]:
    """The result for every item, in their order.

    Where a process is killed, what it may have worked on is done again, each item in a process of its own.

    Args:
        work: a function of a module.
        items: what to work on.
        processes: how many; 1 works in this process, which a reader that crashes then ends.
        killed: the result for an item that ends its process.
    """
    items = list(items)
    if processes <= 1:
        yield from map(work, items)
        return
    while items:
        done = 0
        try:
            with _pool(min(processes, len(items))) as pool:
                for result in pool.map(work, items):
                    yield result
                    done += 1
            return
        except BrokenProcessPool:
            suspects, items = items[done : done + processes], items[done + processes :]
            yield from (_apart(work, item, killed) for item in suspects)


def _apart(work: Callable[[Item], Result], item: Item, killed: Callable[[Item], Result]) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(work, item).result()
    except BrokenProcessPool:
        return killed(item)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
