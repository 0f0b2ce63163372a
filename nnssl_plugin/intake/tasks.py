"""What a worker is asked about one case, and what it answers."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nnssl_plugin.intake.ledger import Origin, source_stamp
from nnssl_plugin.intake.pictures import is_picture
from nnssl_plugin.io.scans import ending_of


@dataclass(frozen=True)
class Source:
    """A file that holds channels of a case, or its labels."""

    path: Path
    relative: Path  # below the input folder
    channels: tuple[int, ...] = (0,)  # of the dataset; several for a 4D file that holds one volume of each
    keep: bool = False  # whether a segmentation, or an image of another modality, is taken all the same


@dataclass(frozen=True)
class Group:
    """The files of one case, before anything of them is read."""

    name: str  # what the case is named after: a path without its ending
    images: tuple[Source, ...]
    label: Source | None = None  # its segmentation; None: a body mask is made


@dataclass(frozen=True)
class Task:
    """A case to examine."""

    group: Group
    staging: Path  # folder for its files, until they are put in place
    modalities: tuple[str, ...]  # names of the dataset's channels; a colour image is one
    ending: str  # of the dataset's files
    resample: bool = False  # whether images on another grid are resampled onto that of the first

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every file of the case."""
        return (*self.group.images, *([self.group.label] if self.group.label else []))

    def fingerprint(self) -> str:
        """What the finding depends on, as 16 hexadecimal digits: the files as they are now, and how they are read."""
        files = [(str(s.path), source_stamp(s.path), s.channels, s.keep) for s in self.sources]
        asked = [self.group.name, files, self.group.label is not None, self.modalities, self.ending, self.resample]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Refusal:
    """Why a file is not taken."""

    source: str
    reason: str
    try_again: bool = False  # whether the cause lies outside of the file


@dataclass(frozen=True)
class Finding:
    """What became of a case; its files, if it is taken, lie in the task's staging folder."""

    origins: tuple[Origin, ...] = ()  # one per file that is taken, everything but the case name
    refusals: tuple[Refusal, ...] = ()
    highest_label: int = 0

    def as_dict(self) -> dict:
        """Everything, as JSON can hold it."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict) -> "Finding":
        """The inverse of :meth:`as_dict`."""
        return Finding(
            origins=tuple(Origin(**row) for row in content["origins"]),
            refusals=tuple(Refusal(**row) for row in content["refusals"]),
            highest_label=content["highest_label"],
        )


def staged(folder: Path, name: str, ending: str) -> Path:
    """A file in a task's staging folder: ``label``, or ``image_0`` for channel 0."""
    return folder / f"{name}{ending}"


def name_without_ending(relative: Path) -> str:
    """A path with forward slashes, without the ending of a scan or 2D image."""
    ending = ending_of(relative) or (relative.suffix if is_picture(relative) else "")
    return relative.as_posix()[: len(relative.as_posix()) - len(ending)]
