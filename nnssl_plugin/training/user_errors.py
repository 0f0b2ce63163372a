"""Errors of the user under nnU-Net's own commands: words on stderr and exit code 2 in place of a traceback."""

import sys
from types import TracebackType

from nnssl_plugin.errors import FAILED, UserError

MARK = f"{UserError.__module__}.{UserError.__qualname__}: "
"""Before the words of an error that a loader's worker raised: PyTorch raises it again with the worker's traceback."""


def words_of(error: BaseException | None) -> str | None:
    """Problem and remedy of a user's error, or of the one that an error was raised from; ``None`` for other errors."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return None if error is None else str(error).rsplit(MARK, 1)[-1].strip()


def end_in_words() -> None:
    """From now on, a user's error that nobody catches ends this process in words; all else is left as it was.

    nnU-Net's commands know nothing of this package and let every error through to the interpreter, which calls
    ``sys.excepthook``.
    """
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)


class _Hook:
    def __init__(self, otherwise):
        self.otherwise = otherwise

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        words = words_of(error)
        if words is None:
            self.otherwise(kind, error, trace)
            return
        print(words, file=sys.stderr)
        sys.exit(FAILED)  # the interpreter honours it here
