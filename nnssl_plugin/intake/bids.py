"""BIDS datasets: which files are scans, by their suffix, whose they are, and participants.tsv as class labels."""

import csv
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path, PurePosixPath

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.ledger import PROVENANCE_FILE, Origin, read_rows
from nnssl_plugin.io.scans import NIFTI_ENDINGS
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.subjects import write_subjects

PARTICIPANTS = "participants.tsv"
NO_SCANS = ("derivatives/*", "sourcedata/*", "code/*", "phenotype/*", "stimuli/*")
"""Folders of a BIDS dataset whose files are made from its scans, or are none."""
IMAGING = ("anat", "pet", "ct", "micr")
"""Folders of three-dimensional scans; those of ``func``, ``dwi`` and ``perf`` are series over time or direction."""
_NAME = re.compile(r"sub-[a-zA-Z0-9]+(?:_[a-zA-Z]+-[a-zA-Z0-9]+)*_(?P<suffix>[a-zA-Z0-9]+)")
_SUBJECT = re.compile(r"sub-[a-zA-Z0-9]+")
_MASKS = ("defacemask", "mask", "dseg", "probseg")


def is_bids(source: Path) -> bool:
    """Whether a folder is a BIDS dataset: it has ``dataset_description.json`` and folders of subjects."""
    return (source / "dataset_description.json").is_file() and any(source.glob("sub-*"))


def bids_patterns(source: Path, suffixes: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Patterns of files to take and to leave out, for :func:`~nnssl_plugin.intake.unlabelled.prepare_dataset`.

    Args:
        source: the BIDS dataset.
        suffixes: what the names of the scans end in (``T1w``, ``FLAIR``, ``pet``); none: every scan in the folders of
            :data:`IMAGING`.

    Raises:
        UserError: the folder is no BIDS dataset, or no file has one of the suffixes; those that occur are named.
    """
    if not is_bids(source):
        raise UserError(
            f"{source} is no BIDS dataset (dataset_description.json and folders sub-*).",
            "Leave out --suffix, and choose files with --include.",
        )
    if not suffixes:
        folders = [pattern for name in IMAGING for pattern in (f"sub-*/{name}/*", f"sub-*/ses-*/{name}/*")]
        return folders, [*NO_SCANS, *(f"*_{suffix}.nii*" for suffix in _MASKS)]
    present = _suffixes(source)
    unknown = [suffix for suffix in suffixes if suffix not in present]
    if unknown:
        raise UserError(
            f"No scan of {source} has the suffix {some(unknown)}.",
            f"There are: {', '.join(sorted(present)) or 'none'}.",
        )
    return [f"sub-*_{suffix}{ending}" for suffix in suffixes for ending in NIFTI_ENDINGS], list(NO_SCANS)


def read_participants(path: Path, scans: Sequence[Path], *, source: Path) -> list[dict[str, str]]:
    """The rows of ``participants.tsv`` about participants with a scan, as a table of class labels has them.

    Args:
        path: the file; its first column is ``participant_id``.
        scans: the scans that are taken.
        source: the BIDS dataset.

    Returns:
        rows with ``case`` (the participant's folder, which stands for all scans in it) and ``subject``.

    Raises:
        UserError: the file cannot be read, has no such column, or names nobody with a scan.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Restore it, or save it as UTF-8.") from error
    reader = csv.DictReader(StringIO(text, newline=""), delimiter="\t")
    if "participant_id" not in (reader.fieldnames or ()):
        raise UserError(f"{path} has no column participant_id.", "Name it so in the first line, with tabs between.")
    scanned = {scan.relative_to(source).parts[0] for scan in scans}
    rows = []
    for line in reader:
        participant = (line.pop("participant_id") or "").strip()
        if participant in scanned:
            cells = {name: (cell or "").strip() for name, cell in line.items() if name}
            rows.append({"case": participant, "subject": participant, **cells})
    if not rows:
        raise UserError(f"{path} names nobody of whom there is a scan.", "It names participants as sub-01, sub-02, …")
    return rows


def write_bids_subjects(folder: Path) -> None:
    """Write which cases of a raw dataset are of one subject, several sessions for example, as ``subjects.csv``."""
    subjects = {}
    for row in read_rows(folder / PROVENANCE_FILE, Origin):
        parts = PurePosixPath(row.source).parts
        subjects[row.case] = next((part for part in reversed(parts) if _SUBJECT.fullmatch(part)), row.case)
    write_subjects(folder, subjects)


def _suffixes(source: Path) -> set[str]:
    found = set()
    for path in source.glob("sub-*/**/*.nii*"):
        name = _NAME.fullmatch(path.name.split(".")[0])
        if name:
            found.add(name["suffix"])
    return found
