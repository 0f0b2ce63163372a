"""Every case is looked at in a worker process, and none of them, whatever its files are, ends the run."""

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from nnssl_plugin.intake.body_mask import body_mask
from nnssl_plugin.intake.contact_sheet import thumbnail, volume_thumbnail
from nnssl_plugin.intake.ledger import LABEL, Origin, source_sha256, source_stamp, text_sha256
from nnssl_plugin.intake.pictures import load_picture, picture_mask, png_bytes
from nnssl_plugin.intake.plausibility import (
    contradiction,
    doubt_by_name,
    is_label_like,
)
from nnssl_plugin.intake.raw_dataset import FILE_ENDING, NORMALISATIONS, PICTURE_ENDING, RGB
from nnssl_plugin.intake.same_grid import Aligned, aligned, header_like, read_labels
from nnssl_plugin.intake.tasks import Finding, Refusal, Source, Task, staged
from nnssl_plugin.intake.workers import in_processes
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.refusals import RejectedScan, UnavailableScan
from nnssl_plugin.io.scans import Scan, ending_of, load_frames, load_scan, stored_bytes

MADE_GREY = "made grey"
"""Status of a rewritten 2D image that had colour."""
LINKED, REWRITTEN = "linked", "rewritten"
SET_ASIDE = "set aside: "
"""Begins the reason of a file that can be read and is left out; ``keep`` takes it."""
THUMBNAIL = "thumbnail.png"
PERCENTILES = (1, 50, 99)
LOOKED_AT = 1 << 16
"""Voxels of which percentiles are taken."""
_STAGING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Result = TypeVar("Result")


def examine_all(tasks: Sequence[Task], processes: int) -> Iterator[Finding]:
    """Findings in the order of the tasks; a file that ends the process that reads it is refused."""
    return in_processes(examine, tasks, processes, killed=_refuse_killed)


def examine(task: Task) -> Finding:
    """Read the files of a case, and stage its label (and what has to be rewritten) where they are good."""
    return _examine_picture(task) if task.ending == PICTURE_ENDING else _examine_volumes(task)


def _refuse_killed(task: Task) -> Finding:
    return _refuse_all(task, "the process that read it was killed, likely for want of memory", try_again=True)


def _refuse_all(task: Task, reason: str, *, try_again: bool = False) -> Finding:
    return Finding(refusals=tuple(Refusal(str(s.path), reason, try_again) for s in task.sources))


def _attempt(source: Source, read: Callable[[], Result]) -> Result | Refusal:
    """What ``read`` returns, or why the file cannot be used, whatever a reader raises."""
    path = str(source.path)
    try:
        return read()
    except RejectedScan as reason:
        return Refusal(path, str(reason), try_again=isinstance(reason, UnavailableScan))
    except MemoryError:
        return Refusal(path, "not enough memory", try_again=True)
    except OSError as error:
        if error.errno in _STAGING_ERRORS:
            raise  # the dataset cannot be written, whatever the file
        return Refusal(path, f"unreadable: {type(error).__name__}: {error}", try_again=True)
    except Exception as error:  # whatever a reader raises for one file, the others go on
        return Refusal(path, f"unreadable: {type(error).__name__}: {str(error)[:160]}")


def _examine_picture(task: Task) -> Finding:
    (source,) = task.group.images
    found = _attempt(source, lambda: _stage_picture(task, source))
    return Finding(refusals=(found,)) if isinstance(found, Refusal) else found


def _examine_volumes(task: Task) -> Finding:
    """A file that cannot be used leaves its channels absent; a label, or a grid, that cannot be refuses the case."""
    refusals: list[Refusal] = []
    channels: dict[int, tuple[Source, Scan]] = {}
    for source in task.group.images:
        found = _attempt(source, lambda source=source: _read_volumes(task, source))  # type: ignore[misc]
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            channels.update({channel: (source, scan) for channel, scan in zip(source.channels, found, strict=True)})
    if not channels:
        return Finding(refusals=tuple(refusals))
    case = _attempt(task.group.label or task.group.images[0], lambda: _stage_case(task, channels))
    if isinstance(case, Refusal):
        return _refuse_all(task, case.reason, try_again=case.try_again)
    return replace(case, refusals=tuple(refusals))


def _read_volumes(task: Task, source: Source) -> tuple[Scan, ...]:
    modality = task.modalities[source.channels[0]]
    _check_name(source, modality)
    many = len(source.channels) > 1
    scans = load_frames(source.path, len(source.channels)) if many else (load_scan(source.path),)
    for channel, scan in zip(source.channels, scans, strict=True):
        _check_intensities(source, scan.array, task.modalities[channel])
    return scans


def _check_name(source: Source, modality: str) -> None:
    reason = doubt_by_name(source.relative, modality)
    if reason and not source.keep:
        raise RejectedScan(SET_ASIDE + reason)


def _check_intensities(source: Source, array: np.ndarray, modality: str) -> None:
    """Binary shapes (``noNorm``) are segmentations by their values."""
    if source.keep:
        return
    if modality not in NORMALISATIONS and is_label_like(array):
        raise RejectedScan(f"{SET_ASIDE}its values are those of a segmentation: few whole numbers in regions")
    reason = contradiction(array, modality)
    if reason:
        raise RejectedScan(SET_ASIDE + reason)


def _stage_case(task: Task, channels: dict[int, tuple[Source, Scan]]) -> Finding:
    """Stage what nnU-Net reads of a case: each channel that cannot be linked, zeros for the absent ones, the label."""
    first = min(channels)
    like = channels[first][1]
    on_grid = {
        channel: aligned(scan, like, names=(task.modalities[channel], task.modalities[first]), resample=task.resample)
        for channel, (_, scan) in sorted(channels.items())
    }
    rewritten = set()
    for channel, (source, scan) in channels.items():
        if not _can_be_linked(source, scan, on_grid[channel]):
            rewritten.add(source.path)
            _write_bytes(staged(task.staging, f"image_{channel}", FILE_ENDING), stored_bytes(on_grid[channel].image))
    for channel in set(range(len(task.modalities))) - set(channels):
        zeros = header_like(like, np.zeros(like.array.shape, dtype=np.uint8))
        _write_bytes(staged(task.staging, f"image_{channel}", FILE_ENDING), stored_bytes(zeros))
    label = _label(task, like, on_grid)
    _write_bytes(staged(task.staging, "label", FILE_ENDING), stored_bytes(header_like(like, label)))
    _write_thumbnail(task, volume_thumbnail(like.array, label, like.image.affine))
    share = "" if task.group.label else f"{label.mean():.4f}"
    rows = [
        _origin(
            source,
            [channels[channel][1] for channel in source.channels],
            status=REWRITTEN if source.path in rewritten else LINKED,
            channel=" ".join(map(str, source.channels)) if len(task.modalities) > 1 else "",
            body_share=share,
            percentiles=_percentiles(on_grid[source.channels[0]].array, label),
        )
        for source in dict.fromkeys(source for source, _ in channels.values())
    ]
    if task.group.label:
        rows.append(_label_origin(task.group.label, like))
    return Finding(origins=tuple(rows), highest_label=int(label.max()) if task.group.label else 0)


def _can_be_linked(source: Source, scan: Scan, found: Aligned) -> bool:
    return found.as_stored and scan.in_mm and ending_of(source.path) == FILE_ENDING and len(source.channels) == 1


def _label(task: Task, like: Scan, channels: dict[int, Aligned]) -> np.ndarray:
    """The segmentation of a case on the grid of its first channel, or the body: what any of its channels shows."""
    if task.group.label:
        return read_labels(task.group.label.path, like, resample=task.resample)
    masks = [
        body_mask(found.array, like.image.affine, modality=task.modalities[channel])
        for channel, found in channels.items()
    ]
    return np.maximum.reduce(masks)


def _origin(
    source: Source, scans: Sequence[Scan], *, status: str, channel: str, body_share: str, percentiles: str
) -> Origin:
    hashes = [scan.voxels_sha256() for scan in scans]
    return Origin(
        case="",
        source=str(source.path),
        sha256=source_sha256(source.path),
        shape="x".join(str(size) for size in scans[0].array.shape),
        spacing_mm="x".join(f"{size:.6g}" for size in scans[0].spacing),
        orientation=scans[0].orientation,
        status=status,
        voxels_sha256=hashes[0] if len(hashes) == 1 else text_sha256(hashes),
        stamp=source_stamp(source.path),
        body_share=body_share,
        percentiles=percentiles,
        channel=channel,
    )


def _label_origin(source: Source, like: Scan) -> Origin:
    sha256 = source_sha256(source.path)
    return Origin(
        case="",
        source=str(source.path),
        sha256=sha256,
        shape="x".join(str(size) for size in like.array.shape),
        spacing_mm="x".join(f"{size:.6g}" for size in like.spacing),
        orientation=like.orientation,
        status=REWRITTEN,
        voxels_sha256=sha256,
        stamp=source_stamp(source.path),
        channel=LABEL,
    )


def _stage_picture(task: Task, source: Source) -> Finding:
    (modality,) = task.modalities
    _check_name(source, modality)
    picture = load_picture(source.path, colour=modality == RGB)
    if picture.array.ndim == 2:
        _check_intensities(source, picture.array, modality)
    mask = picture_mask(picture.array)
    _write_bytes(staged(task.staging, "label", PICTURE_ENDING), png_bytes(mask))
    _write_thumbnail(task, thumbnail(picture.array, mask))
    if not picture.as_stored:
        _write_bytes(staged(task.staging, "image_0", PICTURE_ENDING), png_bytes(picture.array))
    row = Origin(
        case="",
        source=str(source.path),
        sha256=source_sha256(source.path),
        shape="x".join(str(size) for size in picture.array.shape[:2]),
        spacing_mm="",
        orientation="",
        status=LINKED if picture.as_stored else MADE_GREY if picture.lost_colour else REWRITTEN,
        voxels_sha256=picture.pixels_sha256(),
        stamp=source_stamp(source.path),
        body_share=f"{mask.mean():.4f}",
        percentiles=_percentiles(picture.array, mask),
    )
    return Finding(origins=(row,))


def _percentiles(array: np.ndarray, mask: np.ndarray) -> str:
    """Of an image (I, J, K) or (H, W[, 3]) within its mask, or of all of it where that is empty."""
    inside = array[mask > 0] if mask.any() else array.ravel()
    some = inside.ravel()[:: max(1, inside.size // LOOKED_AT)]
    return ";".join(f"{value:.6g}" for value in np.percentile(some, PERCENTILES))


def _write_thumbnail(task: Task, image: Image.Image) -> None:
    with atomic_path(task.staging / THUMBNAIL) as temporary:
        image.save(temporary, format="PNG")


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
