"""Stopping between two steps: on SIGTERM, SIGINT, or when the time is up."""

import os
import signal
import threading
import time

DEADLINE = "NNSSL_PLUGIN_DEADLINE"
"""Environment variable with the time (seconds since the epoch) at which ``nnssl_plugin train --time-limit`` stops;
an environment variable because the processes that nnU-Net spawns for several GPUs must see it too."""
TO_BE_CONTINUED = 75
"""Exit code of a run that stopped early with a checkpoint (EX_TEMPFAIL: try again, with ``--c``)."""


class Interruption:
    """Remembers that the run was asked to stop. Signals are caught from :meth:`watch` on until :meth:`release`."""

    def __init__(self):
        self.reason: str | None = None
        self._previous = {}

    def watch(self) -> None:
        """Catch SIGTERM and SIGINT; a second one acts as it would have without this."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may catch signals
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
        if self.reason is None and time.time() > float(os.environ.get(DEADLINE, "inf")):
            self.reason = "the time limit"
        return self.reason is not None

    def _caught(self, number, frame) -> None:
        self.reason = signal.Signals(number).name
        self.release()
