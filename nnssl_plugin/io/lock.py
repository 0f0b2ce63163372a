"""A lock file that says who works in a folder: host, process, and since when."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from nnssl_plugin.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    since: str


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for this process; it is removed at the end.

    The lock of a process that ended is taken over where it ran on this host; the kernel's lock on the file, which ends
    with its process and is not inherited by workers, decides, and the process id where the file system has no locks.
    A process may take its own lock again.

    Raises:
        UserError: a living process of this host, or any of another host, holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    try:
        _take(descriptor, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    free = _kernel_lock(descriptor)
    while free and not _is_still(descriptor, path):  # its holder removed it between our opening and locking it
        reopened = _open(path)
        os.dup2(reopened, descriptor)
        os.close(reopened)
        free = _kernel_lock(descriptor)
    holder = _read(descriptor)
    if free is False or (holder is not None and not _has_ended(holder, free)):
        raise _refusal(path, holder)
    own = Holder(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(" ", "seconds"))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(own)).encode(), 0)
    os.fsync(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)


def _kernel_lock(descriptor: int) -> bool | None:
    """Whether this process got the kernel's lock; ``None`` where there is none to get."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # ENOLCK, ENOTSUP: some network file systems
        return None
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Holder | None:
    """Who wrote the lock; ``None`` where a process died before it could."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _has_ended(holder: Holder, free: bool | None) -> bool:
    if holder.host != socket.gethostname():
        return False
    return bool(free) or holder.pid == os.getpid() or not _is_alive(holder.pid)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # there, asking by os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _refusal(path: Path, holder: Holder | None) -> UserError:
    if holder is None:
        return UserError(f"Another process works in {path.parent}.", "Wait until it has ended.")
    problem = f"Process {holder.pid} on {holder.host} works in {path.parent} since {holder.since}."
    if holder.host == socket.gethostname() and os.name != "nt":
        return UserError(problem, f"Wait until it has ended, or stop it: kill {holder.pid}")
    return UserError(problem, f"Wait until it has ended. If it no longer runs, delete {path}")
