"""How much memory a process may still take."""

import os
import re
from pathlib import Path


def available_memory() -> int | None:
    """Bytes that are free or can be freed, the limit of a Linux control group included; None where nothing says it."""
    stated = [_of_machine(), _of_control_group(Path("/sys/fs/cgroup"))]
    return min((size for size in stated if size is not None), default=None)


def _of_machine() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, or a system without these names
        return None


def _of_control_group(folder: Path) -> int | None:
    """What a control group (version 2) leaves; pages of files that it can drop count as free."""
    limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
    if not (limit.isdecimal() and used.isdecimal()):
        return None
    cached = re.search(r"^inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
