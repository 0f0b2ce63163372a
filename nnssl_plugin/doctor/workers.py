"""How many processes nnU-Net will start, held against the cores and the memory that are there."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING, Finding, gib

TRAINING, OTHER = "nnUNet_n_proc_DA", "nnUNet_def_n_proc"
TRAINING_DEFAULT, OTHER_DEFAULT = 12, 8
"""nnU-Net's own; the first is capped at the number of cores of the machine, whichever of them may be used."""
MEMORY_PER_WORKER = 2 * GIB
SHARED_MEMORY = 1 * GIB


@dataclass(frozen=True)
class Machine:
    """What this process may use; None where the system does not tell."""

    cores: int
    """Cores that this process may use: affinity and quota of its control group respected."""
    cores_of_machine: int
    memory: int | None
    """Bytes available to new processes."""
    shared_memory: int | None
    """Size of /dev/shm in bytes."""


def this_machine() -> Machine:
    """The machine under this process."""
    everywhere = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    groups, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    available = [size for size in (_available(Path("/proc/meminfo")), memory_quota(groups, root)) if size is not None]
    quota = core_quota(groups, root)
    return Machine(
        cores=max(1, min(allowed, int(quota)) if quota else allowed),
        cores_of_machine=everywhere,
        memory=min(available, default=None),
        shared_memory=shared,
    )


def worker_findings(environment: Mapping[str, str], machine: Machine) -> list[Finding]:
    """Cores, both worker counts of nnU-Net, memory per worker and shared memory."""
    shared = "" if machine.cores == machine.cores_of_machine else f" of {machine.cores_of_machine} may be used"
    findings = [Finding("CPU cores", OK, f"{machine.cores}{shared}")]
    default = min(TRAINING_DEFAULT, machine.cores_of_machine)
    findings += [_count(environment, TRAINING, default, machine), _count(environment, OTHER, OTHER_DEFAULT, machine)]
    training = _number(environment.get(TRAINING, str(default)))
    most = max(training or 0, _number(environment.get(OTHER, str(OTHER_DEFAULT))) or 0, 1)
    if machine.memory is not None:
        findings.append(_memory(machine.memory, most))
    if machine.shared_memory is not None and training != 0 and machine.shared_memory < SHARED_MEMORY:
        findings.append(
            Finding(
                "/dev/shm",
                WARNING,
                f"{gib(machine.shared_memory)}: workers pass their batches there",
                "docker run --shm-size=8g ...   (or: mount -o remount,size=8G /dev/shm)",
            )
        )
    return findings


def core_quota(groups: Path, root: Path) -> float | None:
    """The least CPU quota, in cores, of the control groups that this process is in; None without one.

    Args:
        groups: ``/proc/self/cgroup``.
        root: ``/sys/fs/cgroup``.
    """
    quotas = []
    for folder in _control_groups(groups, root, "cpu"):
        second = _words(folder / "cpu.max")
        first = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        limit = second or first  # version 2 of control groups writes one file, version 1 two
        if len(limit) == 2 and limit[0].isdigit():
            quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def memory_quota(groups: Path, root: Path) -> int | None:
    """The least memory, in bytes, that the control groups of this process still grant; None without a limit."""
    left = []
    for folder in _control_groups(groups, root, "memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit():
            left.append(max(0, int(limit[0]) - int(used[0])))
    return min(left, default=None)


def _control_groups(groups: Path, root: Path, controller: str) -> list[Path]:
    """Folders of the groups that hold for this process, from its own up to the root (versions 1 and 2)."""
    folders = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        own = top / inside.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return folders


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _available(meminfo: Path) -> int | None:
    text = meminfo.read_text() if meminfo.is_file() else ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*\d+\s*", text) else None


def _count(environment: Mapping[str, str], name: str, default: int, machine: Machine) -> Finding:
    said = environment.get(name)
    count = _number(said) if said is not None else default
    suggestion = f"export {name}={machine.cores}"
    if count is None or (count == 0 and name == OTHER):
        return Finding(name, PROBLEM, f"{said!r} is no number of processes", suggestion)
    if count == 0:
        return Finding(
            name,
            WARNING,
            "0: right for training in one process, but planning fails on it",
            f"unset {name}   (or: env -u {name} nnUNetv2_plan_and_preprocess ...)",
        )
    text = f"{count}" if said is not None else f"not set: {count}"
    if count > machine.cores:
        return Finding(name, WARNING, f"{text} processes on {_cores(machine.cores)}", suggestion)
    return Finding(name, OK, text)


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _memory(memory: int, workers: int) -> Finding:
    text = f"{gib(memory)} available, {gib(memory / workers)} for each of {workers} processes"
    if memory / workers >= MEMORY_PER_WORKER:
        return Finding("memory", OK, text)
    fewer = max(1, int(memory / MEMORY_PER_WORKER))
    remedy = f"export {TRAINING}={fewer} {OTHER}={fewer}" if fewer < workers else "top -o %MEM   (shows what to stop)"
    return Finding("memory", WARNING, text, remedy)
