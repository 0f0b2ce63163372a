"""Batches on their way to a trainer: from one pool of workers for training and validation, or from this process.

Workers import what makes batches, and nothing of what trains on them.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import Thread
from types import ModuleType

from torch.utils.data import DataLoader, Dataset

from nnssl_plugin.data.batch import Batch

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
"""How workers are started. Never by a fork of this process: its threads can leave locks behind that nobody opens. On
Linux a server that runs none imports torch once and is forked for every worker, which is Python's own way from 3.14 on;
elsewhere each worker imports torch by itself."""
SERVER_IMPORTS = ["torch"]
"""Takes most of a worker's start. Not blosc2: it starts threads when it is imported."""
LEFT_TO_THE_TRAINER = (signal.SIGTERM, signal.SIGINT)
"""Signals that a scheduler, or a terminal, sends to every process."""
Epoch = tuple[Sequence[int], Sequence[int]]
"""Numbers of the training batches and of the validation batches of an epoch."""


class BatchStream:
    """Batches of one purpose in order, counting the seconds spent waiting for them.

    Args:
        batches: what yields batch *k*.
        source: its batches in the order of the training.
        tell: takes a line for the log: how long the first batch took.
    """

    def __init__(self, batches: Dataset, source: Iterator[Batch], *, tell: Callable[[str], object] | None = None):
        self.batches = batches
        self.waited = 0.0
        self._source: Iterator[Batch] | None = source
        self._tell = tell

    def __next__(self) -> Batch:
        if self._source is None:
            raise ValueError("this stream was closed")
        started = time.perf_counter()
        batch = next(self._source)
        seconds = time.perf_counter() - started
        self.waited += seconds
        if self._tell is not None:
            self._tell(f"First batch after {seconds:.1f} s")
            self._tell = None
        return batch

    def close(self) -> None:
        """End the workers, once every stream of theirs is closed."""
        self._source = None


def open_streams(
    training: Dataset,
    validation: Dataset,
    epochs: Sequence[Epoch],
    *,
    workers: int,
    pin_memory: bool = False,
    tell: Callable[[str], object] | None = None,
) -> tuple[BatchStream, BatchStream]:
    """The two streams of a training, which start with the first batch that is asked for.

    Args:
        training: what yields its batch *k*; defined in a module, not in the script that runs.
        validation: the same of the validation.
        epochs: what each of the epochs takes.
        workers: processes that read ahead for both; 0 reads in this process.
        pin_memory: for faster copies to a CUDA device.
        tell: see :class:`BatchStream`.
    """
    both = (training, validation)
    if workers:
        pool = _Pool(both, epochs, workers=workers, pin_memory=pin_memory)
        sources = [pool.take(part) for part in range(2)]
    else:
        orders = [list(chain.from_iterable(epoch[part] for epoch in epochs)) for part in range(2)]
        sources = [_read(batches, order, pin_memory) for batches, order in zip(both, orders, strict=True)]
    return BatchStream(training, sources[0], tell=tell), BatchStream(validation, sources[1])


def prepare_workers(workers: int) -> None:
    """Start the server that workers are forked from: it imports torch while this process builds a network.

    Args:
        workers: how many there will be; for 0 nothing is started.
    """
    if not workers or METHOD != "forkserver":
        return
    from multiprocessing import forkserver, resource_tracker  # not there on every system

    forkserver.set_forkserver_preload(SERVER_IMPORTS)
    resource_tracker.ensure_running()  # otherwise the server starts it, which unblocks both signals
    # a scheduler signals every process: the server ends with this one, by a pipe of theirs, and must not end before it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_TRAINER)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Pool:
    """Workers that read ahead for several datasets."""

    def __init__(self, parts: Sequence[Dataset], epochs: Sequence[Epoch], *, workers: int, pin_memory: bool):
        self._workers = workers
        self._loader = DataLoader(
            _Several(parts),
            batch_size=None,
            sampler=_in_order(epochs),
            num_workers=workers,
            pin_memory=pin_memory,
            multiprocessing_context=METHOD,
            worker_init_fn=_settle,
        )
        self._iterator: Iterator[tuple[int, Batch]] | None = None
        self._waiting: tuple[deque[Batch], ...] = tuple(deque() for _ in parts)

    def take(self, part: int) -> Iterator[Batch]:
        """Batches of one of the datasets; those of others that come before are kept for whoever asks for them."""
        waiting = self._waiting[part]
        while waiting:
            yield waiting.popleft()
        for found, batch in self._batches():
            self._waiting[found].append(batch)
            while waiting:
                yield waiting.popleft()

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        if self._iterator is None:
            prepare_workers(self._workers)
            with _without_main():
                self._iterator = iter(self._loader)
        return self._iterator


class _Several(Dataset):
    """Batch *k* of one of several datasets, with the number of the dataset."""

    def __init__(self, parts: Sequence[Dataset]):
        self.parts = tuple(parts)

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, Batch]:
        part, number = place
        return part, self.parts[part][number]


def _in_order(epochs: Iterable[Epoch]) -> Iterator[tuple[int, int]]:
    """Number of the dataset and of its batch, as nnU-Net's loop asks for them."""
    for epoch in epochs:
        for part, numbers in enumerate(epoch):
            yield from ((part, number) for number in numbers)


def _read(batches: Dataset, order: Sequence[int], pin_memory: bool) -> Iterator[Batch]:
    yield from DataLoader(batches, batch_size=None, sampler=order, pin_memory=pin_memory)


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes as from an interactive Python, where there is no script that each of them would import anew.

    That of ``nnUNetv2_train`` imports every trainer and torch's compiler: 10 s and more, in every worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _settle(worker: int) -> None:
    """A worker ends with the trainer and not before it.

    A scheduler signals every process; a worker that died of it would break the step that is being finished. Of a
    trainer that is killed a worker hears through a pipe alone: its parent is the server, which waits for it.
    """
    for number in LEFT_TO_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
