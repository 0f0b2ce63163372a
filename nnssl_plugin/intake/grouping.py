"""Which files below a folder are images of one case: by patterns, by folders, or by a table.

The key of a case is **what the wildcards of its patterns match**: ``*_t1*`` and ``*_t2*`` find ``p1/a_t1.nii.gz`` and
``p1/a_t2.nii.gz``, both with the key ``p1/a``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.file_search import matches
from nnssl_plugin.intake.ledger import LABEL
from nnssl_plugin.intake.plausibility import named_as_labels
from nnssl_plugin.intake.tasks import Group, Refusal, Source, name_without_ending
from nnssl_plugin.io.text import printable, some
from nnssl_plugin.nnunet.case_labels import read_table

BY_NAME, BY_FOLDER = "name", "folder"
_NO_MODALITIES = {"case", "subject", LABEL}
"""Columns of a table that hold no images."""
_JOINTS = " _-./"
"""What joins the parts of a name."""


@dataclass(frozen=True)
class Modalities:
    """What the channels of a dataset are, and which files show them."""

    patterns: tuple[tuple[str, str], ...] = ()  # name of the modality and pattern; a modality may have several
    labels: tuple[str, ...] = ()  # patterns of segmentations
    cases_by: str = BY_NAME
    rows: tuple[Mapping[str, str], ...] = ()  # of a table instead of patterns: case, one column per modality, label
    resample: bool = False  # onto the grid of the first image of the case
    label_names: tuple[str, ...] = ()  # of the labels 1, 2, …, where they are known

    @property
    def names(self) -> tuple[str, ...]:
        """Of the channels, in their order."""
        columns = tuple(name for name in self.rows[0] if name not in _NO_MODALITIES) if self.rows else ()
        return columns or tuple(dict.fromkeys(name for name, _ in self.patterns))

    @property
    def has_labels(self) -> bool:
        """Whether every case has a segmentation."""
        return bool(self.labels) or (bool(self.rows) and LABEL in self.rows[0])


@dataclass(frozen=True)
class Grouped:
    """The cases, and what became of the other files."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...] = ()
    left_out: int = 0  # scans that no pattern names


def parse_modalities(
    specs: Sequence[str], *, labels: Sequence[str] = (), cases_by: str = BY_NAME, resample: bool = False
) -> Modalities:
    """``NAME=PATTERN`` each (a name may come again, with another pattern), or one path of a csv.

    Raises:
        UserError: a text is neither.
    """
    if len(specs) == 1 and specs[0].lower().endswith(".csv") and "=" not in specs[0]:
        if labels or cases_by != BY_NAME:
            raise UserError(f"{specs[0]} says which files belong together.", "Leave out --labels and --cases-by.")
        return Modalities(rows=read_cases(Path(specs[0])), resample=resample)
    patterns = []
    for spec in specs:
        name, equals, pattern = spec.partition("=")
        if not (equals and name.strip() and pattern.strip()):
            raise UserError(f"--modalities {spec!r}.", 'Write NAME=PATTERN: --modalities "T1=*t1n*" "T2=*t2w*"')
        patterns.append((name.strip(), pattern.strip()))
    return Modalities(tuple(patterns), tuple(labels), cases_by, (), resample)


def group_scans(scans: Sequence[Path], source: Path, modalities: Modalities, *, keep: Sequence[str] = ()) -> Grouped:
    """Sort scans into cases.

    Args:
        scans: of :func:`~nnssl_plugin.intake.file_search.find_scans`.
        source: the input folder.
        modalities: what to look for. Of several patterns that match a file, one that matches its name
            goes first, then the one with the most letters.
        keep: patterns of scans that are never set aside.

    Raises:
        UserError: no scan is named, or the table does not fit.
    """
    if modalities.rows:
        return group_by_rows(scans, source, modalities)
    found: dict[str, dict[int | None, list[Source]]] = defaultdict(lambda: defaultdict(list))
    refusals, left_out = [], 0
    for scan in scans:
        relative = scan.relative_to(source)
        kept = matches(relative.as_posix(), keep)
        try:
            place = _place(relative, modalities)
        except _Ambiguous as reason:
            refusals.append(Refusal(str(scan), str(reason)))
            continue
        if place is None:
            left_out += 1
            continue
        key, channel = place
        found[key][channel].append(Source(scan, relative, (channel or 0,), kept or channel is None))
    groups = []
    for key, files in sorted(found.items()):
        group = _group(key, files, modalities)
        if isinstance(group, Group):
            groups.append(group)
        else:
            refusals += group
    if not groups and not refusals:
        raise UserError(
            f"No pattern of --modalities matches any of the {len(scans)} scans.",
            f"They are compared with paths such as {printable(min(s.relative_to(source).as_posix() for s in scans))!r}",
        )
    return Grouped(tuple(groups), tuple(refusals), left_out)


class _Ambiguous(Exception):
    """Patterns of several modalities match a file alike."""


def _place(relative: Path, modalities: Modalities) -> tuple[str, int | None] | None:
    """Key of the case and channel (None: its segmentation) of a file; None where nothing names it."""
    path = relative.as_posix()
    for pattern in modalities.labels:
        key = _key(path, pattern)
        if key is not None:
            return (_folder(path) if modalities.cases_by == BY_FOLDER else key), None
    found = [(_rank(path, p), name, key) for name, p in modalities.patterns if (key := _key(path, p)) is not None]
    if not found:
        return None
    highest = max(rank for rank, _, _ in found)
    best = {name: key for rank, name, key in found if rank == highest}
    if len(best) > 1:
        raise _Ambiguous(f"patterns of {' and '.join(best)} match it alike: make one of them longer")
    ((name, key),) = best.items()
    return (_folder(path) if modalities.cases_by == BY_FOLDER else key), modalities.names.index(name)


def _group(key: str, files: Mapping[int | None, list[Source]], modalities: Modalities) -> Group | list[Refusal]:
    images = {channel: sources for channel, sources in files.items() if channel is not None}
    every = [source for sources in files.values() for source in sources]
    for channel, sources in files.items():
        clear = [source for source in sources if source.keep or not named_as_labels(source.relative)]
        if len(clear) > 1:
            what = "segmentations" if channel is None else f"images of {modalities.names[channel]}"
            names = some([printable(source.relative.as_posix()) for source in clear])
            reason = f"several {what} for one case: {printable(key)} has {names}"
            return [Refusal(str(source.path), reason) for source in every]
    if not images:
        return [Refusal(str(source.path), "a segmentation without an image") for source in every]
    if modalities.labels and None not in files:
        return [Refusal(str(source.path), f"no segmentation for its case: {printable(key)}") for source in every]
    ordered = [source for channel in sorted(images) for source in images[channel]]
    return Group(key, tuple(ordered), files[None][0] if None in files else None)


def _folder(path: str) -> str:
    return PurePosixPath(path).parent.as_posix()


def _rank(path: str, pattern: str) -> tuple[bool, int]:
    """What matches the file's name goes before what matches its folders, then the pattern with the most letters."""
    letters = len(re.sub(r"[*?]|\[.*?\]", "", pattern))
    return _expression(pattern).fullmatch(path.rpartition("/")[2]) is not None, letters


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern of ``fnmatch`` with a group around each of its wildcards, as many characters as possible first."""
    parts = re.findall(r"\*+|\?|\[[^\]]*\]|[^*?\[]+|\[", pattern)
    wild = {"?": "(.)"}
    regex = "".join(
        "(.*)"
        if part[0] == "*"
        else wild.get(part) or (_one_of(part) if part[0] == "[" and len(part) > 1 else re.escape(part))
        for part in parts
    )
    return re.compile(regex, re.DOTALL)


def _one_of(characters: str) -> str:
    inside = characters[1:-1].replace("\\", "\\\\")
    return f"([^{inside[1:]}])" if inside.startswith("!") else f"([{inside}])"


def _key(path: str, pattern: str) -> str | None:
    """What the wildcards of a pattern match of a path, or of its last part alone, without the file's ending."""
    whole = _expression(pattern).fullmatch(path)
    name = whole or _expression(pattern).fullmatch(path.rpartition("/")[2])
    if name is None:
        return None
    parts = [part or "" for part in name.groups()]
    if whole is None:
        parts.insert(0, path.rpartition("/")[0] + "/")
    if parts:
        parts[-1] = name_without_ending(Path(parts[-1])) if parts[-1] not in ("", ".") else parts[-1]
    return _joined(parts) or _joined([path.rpartition("/")[0]]) or "case"


def _joined(parts: Iterable[str]) -> str:
    """Parts of a name without what joined them to the pattern's letters."""
    kept = [part.strip(_JOINTS) for part in parts]
    return "_".join(part for part in kept if part)


def read_cases(table: Path) -> tuple[Mapping[str, str], ...]:
    """The rows of a csv with the columns ``case``, one per modality, and perhaps ``label``; cells hold paths.

    Raises:
        UserError: it cannot be read, names no image, or lacks a name or, where it has labels, a label.
    """
    rows = read_table(table)
    if not set(rows[0]) - _NO_MODALITIES:
        raise UserError(f"{table} names no images of cases.", "Its header reads case,T1,T2,…,label (label: optional).")
    for row in rows:
        if not any(cell for column, cell in row.items() if column not in _NO_MODALITIES):
            raise UserError(f"{table}: case {row['case']} has no image.", "Fill in a column, or delete the row.")
        if LABEL in row and not row[LABEL]:
            raise UserError(
                f"{table}: case {row['case']} has no label.", "Fill it in, or delete the row or the column."
            )
    return tuple(rows)


def group_by_rows(scans: Sequence[Path], source: Path, modalities: Modalities) -> Grouped:
    """The cases of a table; what it names is never set aside.

    Raises:
        UserError: a file is not below the input folder, or is named twice.
    """
    by_path = {scan.relative_to(source).as_posix(): scan for scan in scans}
    groups, used, unknown = [], set(), []
    for row in modalities.rows:
        files = {column: _below(row[column], source) for column in (*modalities.names, LABEL) if row.get(column)}
        unknown += [path for path in files.values() if path not in by_path]
        twice = [path for path in files.values() if path in used]
        if twice or len(set(files.values())) < len(files):
            raise UserError(f"The table names {some(twice or list(files.values()))} twice.", "Name every file once.")
        used |= set(files.values())
        if unknown:
            continue
        images = [
            Source(by_path[files[name]], Path(files[name]), (channel,), keep=True)
            for channel, name in enumerate(modalities.names)
            if name in files
        ]
        label = Source(by_path[files[LABEL]], Path(files[LABEL]), keep=True) if LABEL in files else None
        groups.append(Group(row["case"], tuple(images), label))
    if unknown:
        raise UserError(
            f"The table names files that are not below {source}: {some(unknown)}.",
            "Write each relative to the scans' folder, or by its absolute path.",
        )
    return Grouped(tuple(groups), (), len(scans) - len(used))


def single_groups(scans: Iterable[Path], source: Path, *, keep: Sequence[str] = ()) -> tuple[Group, ...]:
    """Every scan is a case."""
    groups = []
    for scan in scans:
        relative = scan.relative_to(source)
        image = Source(scan, relative, keep=matches(relative.as_posix(), keep))
        groups.append(Group(name_without_ending(relative), (image,)))
    return tuple(groups)


def _below(cell: str, source: Path) -> str:
    path = PurePosixPath(cell.replace("\\", "/"))
    return path.relative_to(source.as_posix()).as_posix() if path.is_relative_to(source.as_posix()) else path.as_posix()
