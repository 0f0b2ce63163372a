"""Which cases a dataset has and which files it refused: decides what a finding becomes, and puts its files in place."""

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from nnssl_plugin.intake.examination import LINKED, SET_ASIDE, THUMBNAIL
from nnssl_plugin.intake.ledger import (
    LABEL,
    PROVENANCE_FILE,
    REJECTED_FILE,
    Origin,
    Rejection,
    case_content,
    read_rows,
    source_sha256,
    source_stamp,
    write_rows,
)
from nnssl_plugin.intake.raw_dataset import (
    DatasetKind,
    case_name,
    image_path,
    label_path,
    write_dataset_json,
    write_modalities,
)
from nnssl_plugin.intake.same_grid import ANOTHER_GRID
from nnssl_plugin.intake.tasks import Finding, Group, Refusal, Source, Task, staged
from nnssl_plugin.io.files import atomic_path, keep_file
from nnssl_plugin.io.text import printable

log = logging.getLogger(__name__)

DUPLICATE = "duplicate content"
THUMBNAILS = "thumbnails"
"""Folder of a dataset: a small picture per case, of which the contact sheet is made."""
LONGEST_NAME = 160
"""Characters of a case name; file systems allow 255 bytes with everything that is added to it."""


class CaseLedger:
    """The cases and refusals of a dataset.

    Args:
        folder: of the dataset.
        root: the input folder.
        kind: what the dataset holds.
    """

    def __init__(self, folder: Path, root: Path, kind: DatasetKind):
        self.folder, self.root, self.kind = folder, root, kind
        self.cases: dict[str, tuple[Origin, ...]] = {}
        self.case_of: dict[str, str] = {}  # source → case
        self.by_content: dict[str, str] = {}  # hash of the voxels → case
        self.names: set[str] = set()  # in lower case: some file systems ignore it
        rows = defaultdict(list)
        for row in read_rows(folder / PROVENANCE_FILE, Origin):
            rows[row.case].append(row)
        for case, of_case in rows.items():
            self._enter(case, of_case)
        refused = read_rows(folder / REJECTED_FILE, Rejection)
        self.rejected_before = {r.source: r for r in refused if Path(r.source).is_relative_to(root)}
        self.rejected_elsewhere = [r for r in refused if not Path(r.source).is_relative_to(root)]
        self.rejected: dict[str, Rejection] = {}
        self.added: list[str] = []
        self.highest_label = 0
        self.source_lost = any(not os.path.exists(source) for source in self.case_of)

    @property
    def origins(self) -> list[Origin]:
        """The rows of all cases."""
        return [row for rows in self.cases.values() for row in rows]

    def is_settled(self, group: Group, *, resample: bool = False) -> bool:
        """Whether earlier runs have decided on the files of a case and none has changed since.

        A file that was set aside is looked at again where it is kept now, or nothing was taken yet: the modality may
        then be another."""
        sources = (*group.images, *([group.label] if group.label else []))
        refused = [source for source in sources if self._is_refused_still(source, resample)]
        taken = [source for source in sources if source not in refused]
        wanted = {str(source.path): _channel(source, group, self.kind) for source in taken}
        cases = {self.case_of[path] for path in wanted if path in self.case_of}
        rows = [row for case in cases for row in self.cases[case]]
        settled = {row.source: row.channel for row in rows} == wanted and len(cases) <= 1
        settled = settled and all(self._is_unchanged(source) for source in taken)
        if settled:
            self.rejected.update({str(s.path): self.rejected_before[str(s.path)] for s in refused})
        return settled

    def make_way(self, group: Group) -> None:
        """Take back the cases that hold files of a case which is about to be entered anew."""
        sources = (*group.images, *([group.label] if group.label else []))
        for case in sorted({self.case_of[str(s.path)] for s in sources if str(s.path) in self.case_of}):
            log.warning("%s has changed since it was taken as case %s; it is taken anew.", printable(group.name), case)
            self._withdraw(case)

    def absent(self) -> tuple[tuple[str, int], ...]:
        """Of several modalities, each that some case lacks, with the number of such cases."""
        if len(self.kind.files) == 1:
            return ()
        present = [_channels(rows) for rows in self.cases.values()]
        lacking = ((name, sum(number not in of for of in present)) for number, name in enumerate(self.kind.files))
        return tuple((name, count) for name, count in lacking if count)

    def enter(self, task: Task, finding: Finding, note: Callable[[str], None]) -> None:
        """Accept or refuse one examined case.

        Args:
            task: what was examined.
            finding: about it.
            note: is told the name of a case before its files are put in place.
        """
        for refusal in finding.refusals:
            self.refuse(refusal)
        rows = finding.origins
        if not rows:
            return
        known, name = self.by_content.get(case_content(rows)), None
        if known is not None:
            sources = [row.source for row in self.cases[known]]
            if all(map(os.path.exists, sources)):
                for row in rows:
                    self.refuse(Refusal(row.source, f"{DUPLICATE}: the same voxels as {sources[0]} (case {known})"))
                return
            name = known  # the same scan has moved: its case goes on from the new place
            self._withdraw(known)
        name = name or self._free_name(task.group.name, rows[0].sha256)
        note(name)
        self._accept(name, rows, task)
        self.highest_label = max(self.highest_label, finding.highest_label)

    def refuse(self, refusal: Refusal) -> None:
        """List a file as refused."""
        stamp = "" if refusal.try_again else source_stamp(Path(refusal.source))  # without a stamp it is never settled
        self.rejected[refusal.source] = Rejection(refusal.source, printable(refusal.reason), stamp)

    def save(self, groups: Collection[Group]) -> None:
        """Write the tables, dataset.json and modalities.json.

        Args:
            groups: of this run; what earlier runs refused of their files stays refused where this one was interrupted.
        """
        for source in (str(source.path) for group in groups for source in group.images):
            row = self.rejected_before.get(source)
            if row and source not in self.rejected and source not in self.case_of and os.path.exists(source):
                self.rejected[source] = row
        refused = [*self.rejected_elsewhere, *self.rejected.values()]
        rows = sorted(self.origins, key=lambda row: (row.case, row.channel))
        write_rows(self.folder / PROVENANCE_FILE, Origin, rows)
        write_rows(self.folder / REJECTED_FILE, Rejection, sorted(refused, key=lambda row: row.source))
        write_dataset_json(self.folder, self.kind, cases=len(self.cases), highest_label=self.highest_label)
        if len(self.kind.files) > 1:
            write_modalities(self.folder, {case: _channels(rows) for case, rows in self.cases.items()})

    def _is_refused_still(self, source: Source, resample: bool) -> bool:
        row, stamp = self.rejected_before.get(str(source.path)), source_stamp(source.path)
        if row is None or not stamp or row.stamp != stamp:
            return False
        if row.reason.startswith(SET_ASIDE):
            return not source.keep and bool(self.cases)
        if row.reason.startswith(ANOTHER_GRID):
            return not resample
        return not (self.source_lost and row.reason.startswith(DUPLICATE))

    def _is_unchanged(self, source: Source) -> bool:
        path, stamp = str(source.path), source_stamp(source.path)
        case = self.case_of.get(path)
        if case is None or not stamp or not all(file.exists() for file in self._files(case)):
            return False
        row = next(row for row in self.cases[case] if row.source == path)
        if row.stamp == stamp:
            return True
        if row.sha256 != source_sha256(source.path):
            return False
        self.cases[case] = tuple(replace(r, stamp=stamp) if r is row else r for r in self.cases[case])
        return True

    def _accept(self, case: str, rows: Sequence[Origin], task: Task) -> None:
        sources = {channel: row for row in rows if row.channel != LABEL for channel in row.channel.split() or ["0"]}
        statuses = {}
        for channel in range(len(self.kind.files)):
            target, row = image_path(self.folder, case, self.kind.ending, channel), sources.get(str(channel))
            made = staged(task.staging, f"image_{channel}", self.kind.ending)
            if row is None or row.status != LINKED:
                _place(made, target)
            else:
                statuses[row.source] = _link(Path(row.source), task.staging / "link", target)
        _place(staged(task.staging, "label", self.kind.ending), label_path(self.folder, case, self.kind.ending))
        _place(task.staging / THUMBNAIL, self.folder / THUMBNAILS / f"{case}.png")
        self._enter(case, [replace(row, case=case, status=statuses.get(row.source, row.status)) for row in rows])
        self.added.append(case)

    def _enter(self, case: str, rows: Sequence[Origin]) -> None:
        self.cases[case] = tuple(rows)
        self.case_of.update({row.source: case for row in rows})
        self.by_content[case_content(rows)] = case
        self.names.add(case.casefold())

    def _withdraw(self, case: str) -> None:
        rows = self.cases.pop(case)
        for row in rows:
            self.case_of.pop(row.source, None)
        self.by_content.pop(case_content(rows), None)
        self.names.discard(case.casefold())
        self.remove_files(case)

    def remove_files(self, case: str) -> None:
        """Remove what lies in the dataset for a case."""
        for path in (*self._files(case), self.folder / THUMBNAILS / f"{case}.png"):
            path.unlink(missing_ok=True)

    def _files(self, case: str) -> list[Path]:
        channels = range(len(self.kind.files))
        images = [image_path(self.folder, case, self.kind.ending, channel) for channel in channels]
        return [*images, label_path(self.folder, case, self.kind.ending)]

    def _free_name(self, name: str, sha256: str) -> str:
        whole = case_name(name)
        name = whole[:LONGEST_NAME]
        if name == whole and name.casefold() not in self.names:
            return name
        lengths = (length for length in range(8, 65) if f"{name}_{sha256[:length]}".casefold() not in self.names)
        return f"{name}_{sha256[: next(lengths)]}"


def _channel(source: Source, group: Group, kind: DatasetKind) -> str:
    """What a row's column ``channel`` says of a file."""
    if source is group.label:
        return LABEL
    return " ".join(map(str, source.channels)) if len(kind.files) > 1 else ""


def _channels(rows: Sequence[Origin]) -> list[int]:
    """The channels that a case has."""
    return sorted(int(channel) for row in rows if row.channel != LABEL for channel in row.channel.split())


def _place(made: Path, target: Path) -> None:
    """Put a staged file in place; it stays where it is too, for a run that is killed before its end."""
    target.parent.mkdir(exist_ok=True)
    keep_file(made, target)


def _link(source: Path, link: Path, target: Path) -> str:
    """Link (or copy) a file to its place, and say which."""
    target.parent.mkdir(exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.unlink(missing_ok=True)
        os.symlink(source, link)
        os.replace(link, target)
    except (OSError, NotImplementedError):
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return "copied"
    return LINKED
