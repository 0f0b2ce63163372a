"""Texts are kept the moment they arrive: a file that grows line by line, until it is merged into the triplets.

``.captions_in_progress.jsonl`` begins with a line about the run; then follows one line per text. A kill leaves at most
half a line at its end. ``captions.json`` holds the options of each captioner, and how much it was asked.
"""

import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from nnssl_plugin.captions.captioners import Answer, Captioner
from nnssl_plugin.data.struck import SliceKey
from nnssl_plugin.data.triplets import TRIPLETS_FILE, Triplet, all_triplets, by_case, write_triplets
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.planes import PLANES

JOURNAL_FILE = ".captions_in_progress.jsonl"
RECORD_FILE = "captions.json"


@dataclass(frozen=True)
class Run:
    """By which captioner and for which draw texts are written: what decides which lines stay."""

    captioner: str  # signature
    seed: int
    body_part: str | None

    def keeps(self, line: Triplet) -> bool:
        """Whether a line stays as it is: another wrote it, or this captioner did so with these options and draw."""
        if not self.wrote(line):
            return True
        return line.captioner == self.captioner and line.seed == self.seed and self.body_part in (None, line.body_part)

    def wrote(self, line: Triplet) -> bool:
        """Whether a line is this captioner's, with whatever options."""
        return line.captioner.split(" ")[0] == self.captioner.split(" ")[0]


@dataclass(frozen=True)
class Cost:
    """What texts took."""

    texts: int = 0
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Journal:
    """The growing file of one run; :meth:`add` may be called from several threads."""

    def __init__(self, raw_folder: Path, run: Run, options: Mapping[str, Any]):
        self.cost = Cost()
        self._lock = threading.Lock()
        self._stream = (raw_folder / JOURNAL_FILE).open("w", encoding="utf-8")
        self._write({"id": uuid.uuid4().hex, "run": asdict(run), "options": dict(options)})

    def add(self, triplet: Triplet, answer: Answer) -> None:
        """Keep a triplet and what it cost; on return it is on the disk."""
        cost = Cost(1, answer.requests, answer.tokens_in, answer.tokens_out)
        with self._lock:
            self._write({"triplet": asdict(triplet), "cost": asdict(cost)})
            self.cost += cost

    def close(self) -> None:
        self._stream.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(content, ensure_ascii=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def options_of(captioner: Captioner) -> dict[str, Any]:
    """All options of a captioner, defaults included."""
    options = getattr(captioner, "options", None)
    return asdict(options) if is_dataclass(options) and not isinstance(options, type) else {}


def merge_journal(raw_folder: Path, struck: set[SliceKey]) -> None:
    """Take what a journal holds into ``triplets.jsonl`` and ``captions.json``, and remove it.

    A kill between these steps does no harm: the next call does what is missing.

    Args:
        raw_folder: raw dataset; nothing happens where it holds no journal.
        struck: slices whose lines stay, whoever wrote them.
    """
    path = raw_folder / JOURNAL_FILE
    if not path.is_file():
        return
    header, entries = _read(path)
    if entries:
        run = Run(**header["run"])
        _merge_triplets(raw_folder, run, [Triplet(**entry["triplet"]) for entry in entries], struck)
        _merge_costs(raw_folder, run.captioner, header, [Cost(**entry["cost"]) for entry in entries])
    path.unlink()


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the entries up to the first that a kill or a failing disk left unfinished."""
    whole: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # behind the last line break stands nothing, or half a line
        try:
            whole.append(json.loads(line))
        except ValueError:
            break
    return (whole[0], whole[1:]) if whole else ({}, [])


def _merge_triplets(raw_folder: Path, run: Run, new: Sequence[Triplet], struck: set[SliceKey]) -> None:
    lines = by_case(all_triplets(raw_folder)) if (raw_folder / TRIPLETS_FILE).is_file() else {}
    for case, added in by_case(new).items():
        there = {line.key: line for line in lines.get(case, ()) if run.keeps(line) or line.key in struck}
        there |= {line.key: line for line in added}
        lines[case] = sorted(there.values(), key=_place)
    write_triplets(raw_folder, [line for _, of_case in sorted(lines.items()) for line in of_case])


def _place(line: Triplet) -> tuple[int, int]:
    return PLANES.index(line.plane), line.slice


def _merge_costs(raw_folder: Path, captioner: str, header: Mapping[str, Any], costs: Sequence[Cost]) -> None:
    path = raw_folder / RECORD_FILE
    record: dict[str, Any] = read_json(path, dict) if path.is_file() else {"merged": "", "captioners": {}}
    if record["merged"] == header["id"]:
        return
    before = Cost(**record["captioners"].get(captioner, {}).get("cost", {}))
    total = sum(costs, start=before)
    record["captioners"][captioner] = {"options": header["options"], "cost": asdict(total)}
    record["merged"] = header["id"]
    write_json(path, record)
