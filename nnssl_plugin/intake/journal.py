"""What a run found out so far, kept beside the files that it staged, so that the next run goes on after a kill."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.examination import examine_all
from nnssl_plugin.intake.tasks import Finding, Task

INCOMING = ".incoming"
"""Folder in a dataset: staged files, and the journals of the runs that made them."""
_NAMES = "names.jsonl"


class Journal:
    """Findings by the fingerprint of their task; whatever a kill leaves behind is at most one broken last line.

    Args:
        folder: :data:`INCOMING` of a dataset.
        name: of the file that new findings go to; the findings of every file in the folder are known.
    """

    def __init__(self, folder: Path, name: str = "findings.jsonl"):
        self.folder = folder
        self.path = folder / name
        self.found = {
            line["task"]: Finding.from_dict(line["finding"])
            for path in sorted(folder.glob("findings*.jsonl"))
            for line in _lines(path)
        }
        self.placed = [line["case"] for line in _lines(folder / _NAMES)]

    def examine(self, tasks: Sequence[Task], processes: int) -> Iterator[Finding]:
        """A finding for every task, in their order: that of an earlier run where it still holds, or a new one."""
        known = [self.known(task) for task in tasks]
        new = examine_all([task for task, finding in zip(tasks, known, strict=True) if finding is None], processes)
        for task, finding in zip(tasks, known, strict=True):
            if finding is None:
                finding = next(new)
                _append(self.path, {"task": task.fingerprint(), "finding": finding.as_dict()})
            yield finding

    def known(self, task: Task) -> Finding | None:
        """What an earlier run found out about a task whose files are as they were; None where it has to be examined."""
        finding = self.found.get(task.fingerprint())
        if finding is None or any(refusal.try_again for refusal in finding.refusals):
            return None
        return finding if not finding.origins or task.staging.is_dir() else None

    def place(self, case: str) -> None:
        """Note that the files of a case are about to be put in place."""
        _append(self.folder / _NAMES, {"case": case})
        self.placed.append(case)

    def remove(self) -> None:
        """Remove the folder: all it holds is in the dataset."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_complete(journal: Journal, tasks: Sequence[Task], parts: int) -> None:
    """Look whether every part has done its share.

    Raises:
        UserError: some have not; it names them.
    """
    left = {number % parts for number, task in enumerate(tasks) if task.fingerprint() not in journal.found}
    if left:
        names = ", ".join(map(str, sorted(left)))
        raise UserError(
            f"Parts that are not complete: {names} (of 0 to {parts - 1}).",
            f"Run each to its end, then merge: the same command with -num_parts {parts} -part_id {min(left)}",
        )


def _append(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        stream.write(json.dumps(content).encode("ascii") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _lines(path: Path) -> Iterable[dict]:
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):  # the line that a kill, or a full disk, broke off
            yield json.loads(line)
