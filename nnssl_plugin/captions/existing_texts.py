"""The captioner that takes texts which people already have: a table, or a folder of reports.

- A table (``.csv``): columns ``case`` and ``text``; of a row with ``plane`` and ``slice``, the text is that slice's.
- A folder: ``CASE.txt`` (or ``.md``) files anywhere below it. The only such file of a folder is also the text of the
  case of that folder's name, as in M3D-Cap (a folder per case with a report and folders of pictures). Of a report
  with M3D-Cap's fields, the findings are taken, else the discussion.
"""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnssl_plugin.captions.captioners import TRANSPORT, SliceFacts
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.planes import PLANES

REPORTS = (".txt", ".md")
FIELDS = ("study_findings", "discussion")
"""Fields of M3D-Cap's reports, of which the first that has a text is taken."""
FORM = "A table has the columns case and text, and may have plane and slice (counted from 0, as stored)."


@dataclass(frozen=True)
class ExistingTextsOptions:
    """Where the texts lie."""

    texts: str = field(default="", metadata=TRANSPORT)
    """A table or a folder."""


class ExistingTexts:
    """Knows texts of cases, and of single slices.

    Raises:
        UserError: there is no such file or folder, a table is malformed, or a case has two texts.
    """

    name = "file"
    Options = ExistingTextsOptions

    def __init__(self, options: ExistingTextsOptions):
        self.options = options
        path = Path(options.texts)
        if not options.texts or not path.exists():
            problem = f"There are no texts: {options.texts or 'none are named'}."
            raise UserError(problem, "Name a table or a folder of reports: --texts PATH")
        self._of_slice: dict[str, dict[tuple[str, int], str]] = {}
        self._of_case: dict[str, str] = {}
        if path.is_dir():
            self._of_case = dict(_reports(path))
        else:
            self._read_table(path)
        if not (self._of_case or self._of_slice):
            raise UserError(f"{path} holds no text.", f"{FORM} A folder has a CASE.txt per case.")
        everything = repr((sorted(self._of_case.items()), sorted(self._of_slice.items())))
        self.fingerprint = hashlib.sha256(everything.encode()).hexdigest()[:12]

    def knows(self, case: str) -> bool:
        """See :class:`~nnssl_plugin.captions.captioners.PlacedCaptioner`."""
        return case in self._of_case or case in self._of_slice

    def places(self, case: str) -> Sequence[tuple[str, int]] | None:
        """See :class:`~nnssl_plugin.captions.captioners.PlacedCaptioner`; a case's own text serves any slice."""
        return list(self._of_slice[case]) if case in self._of_slice else None

    def describe(self, slices: Sequence[np.ndarray], facts: Sequence[SliceFacts]) -> list[str]:
        """See :class:`~nnssl_plugin.captions.captioners.Captioner`."""
        return [self._text(fact) for fact in facts]

    def _text(self, facts: SliceFacts) -> str:
        own = self._of_slice.get(facts.case, {}).get((facts.plane, facts.index))
        return own or self._of_case.get(facts.case, "")

    def _read_table(self, path: Path) -> None:
        for where, row in _rows(path):
            case, text, plane, index = (row.get(name, "") for name in ("case", "text", "plane", "slice"))
            if not case or not text:
                raise UserError(f"{where}: a case or its text is missing.", FORM)
            if not plane and not index:
                if case in self._of_case:
                    raise UserError(f"{where}: case {case} has two texts.", "Keep one, or give plane and slice.")
                self._of_case[case] = text
                continue
            if plane not in PLANES or not index.isdecimal():
                raise UserError(f"{where}: plane {plane!r}, slice {index!r}.", f"Planes: {', '.join(PLANES)}. {FORM}")
            of_case = self._of_slice.setdefault(case, {})
            if (plane, int(index)) in of_case:
                raise UserError(f"{where}: {plane} {index} of case {case} has two texts.", "Keep one.")
            of_case[plane, int(index)] = text


def findings(report: str) -> str:
    """The text of a report: of one with M3D-Cap's fields the findings, else the discussion; of any other, all."""
    for name in FIELDS:
        found = re.search(rf"^\s*{name}\s*:(.*?)(?=^\s*[a-z]+(?:_[a-z]+)*\s*:|\Z)", report, re.M | re.S | re.I)
        if found and found.group(1).strip():
            return found.group(1).strip()
    return report.strip()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where a row stands, and its cells by column name in lower case."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = {"case", "text"} - {(name or "").strip().lower() for name in reader.fieldnames or ()}
            if missing:
                raise UserError(f"{path} has no column {' and '.join(sorted(missing))}.", FORM)
            for row in reader:
                cells = {k.strip().lower(): (v or "").strip() for k, v in row.items() if isinstance(k, str)}
                yield f"{path}, line {reader.line_num}", cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Save it as a table in UTF-8 with commas.") from error


def _reports(folder: Path) -> dict[str, str]:
    """Name of a case → its text. Names that several files could mean stand for none of them."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in REPORTS and path.is_file())
    per_folder = Counter(path.parent for path in files)
    meant: dict[str, set[Path]] = {}
    for path in files:
        inside = path.relative_to(folder)
        names = {path.stem, _case_name(inside.with_suffix("").as_posix())}
        if path.parent != folder and per_folder[path.parent] == 1:
            names |= {path.parent.name, _case_name(inside.parent.as_posix())}
        for name in names:
            meant.setdefault(name, set()).add(path)
    found = {name: findings(_read(*paths)) for name, paths in meant.items() if len(paths) == 1}
    return {name: text for name, text in found.items() if text}


def _case_name(relative: str) -> str:
    """As ``prepare`` names a case: ``siteA/scan 1`` → ``siteA_scan_1``."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", relative).strip("_")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Save it as text in UTF-8.") from error
