"""Stopping between two steps: on SIGTERM, SIGINT, or when the time is up."""

import os
import signal
import threading
import time

DEADLINE = "NNSSL_PLUGIN_DEADLINE"
"""Environment variable with the time (seconds of ``time.monotonic()``) at which ``nnssl_plugin train --time-limit``
stops; an environment variable because the processes of several ranks must see it too. A wall clock may be set back or
forth meanwhile; the monotonic one is the same for all processes of a machine (CLOCK_MONOTONIC on Linux, the time since
the start of the machine on macOS and Windows) and stands still while it sleeps on Linux and macOS."""
TO_BE_CONTINUED = 75
"""Exit code of a run that stopped early with a checkpoint (EX_TEMPFAIL: try again, with ``--c``)."""
SECONDS_OF_ONE_REQUEST = 2.0
"""Signals within this time are one request: a scheduler signals every process, and a launcher passes its own on."""


class Interruption:
    """Remembers that the run was asked to stop. Signals are caught from :meth:`watch` on until :meth:`release`."""

    def __init__(self):
        self.reason: str | None = None
        self._caught_at = 0.0
        self._previous = {}

    def watch(self) -> None:
        """Catch SIGTERM and SIGINT; a second one, some seconds later, acts as it would have without this.

        Workers that are forked from now on inherit this and outlive the first signal, too.
        """
        if threading.current_thread() is not threading.main_thread() or self._previous:  # others may not catch signals
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._caught)

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def requested(self) -> bool:
        """Whether the run should stop now."""
        if self.reason is None and time.monotonic() > float(os.environ.get(DEADLINE, "inf")):
            self.reason = "the time limit"
        return self.reason is not None

    def _caught(self, number, frame) -> None:
        if self._caught_at == 0:
            self.reason, self._caught_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._caught_at > SECONDS_OF_ONE_REQUEST:
            self.release()
            signal.raise_signal(number)
