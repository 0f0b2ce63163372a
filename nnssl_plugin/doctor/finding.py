"""What an examination finds: one line, its status, and the command that mends it."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"
STATUSES = (OK, WARNING, PROBLEM)

GIB = 2**30
"""Bytes of a GiB, the unit of every size that is shown."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``warning`` means that everything still works, or that only some uses need it; ``problem`` that something fails.
    """

    topic: str
    status: str
    """One of :data:`STATUSES`."""
    message: str
    remedy: str = ""
    """The command (or change) that mends it; empty where nothing is to be mended."""
    section: str = ""
    """The heading under which it is shown."""


def gib(size: float) -> str:
    """A size in bytes as text in GiB, for example ``7.5 GiB``."""
    return f"{size / GIB:.1f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"
