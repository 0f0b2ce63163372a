"""One stack of planes becomes a NIfTI scan, and the structures drawn on it its labels."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.intake.dicom.files import ExportFile, on_disk, open_file, require_pydicom
from nnssl_plugin.intake.dicom.geometry import LPS_TO_RAS, stack_grid, straighten
from nnssl_plugin.intake.dicom.headers import Frame, read_whole
from nnssl_plugin.intake.dicom.pixels import read_planes, same_pixels
from nnssl_plugin.intake.dicom.stacks import Stack, places_with_several, without
from nnssl_plugin.intake.dicom.structures import WantedStructure, draw_labels
from nnssl_plugin.intake.dicom.suv import suv_factor
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.io.refusals import RejectedScan, UnavailableScan
from nnssl_plugin.io.scans import stored_bytes

VERSION = 1
"""Of what is written; a scan that another version wrote is written anew."""
_MM = 2  # NIfTI's code


@dataclass(frozen=True)
class Job:
    """A stack to convert."""

    stack: Stack
    image: Path  # the file to write
    state: Path  # the file that says what became of it
    labels: Path | None = None  # the file of labels to write
    drawings: tuple[ExportFile, ...] = ()  # structure sets and segmentations, the newest last
    wanted: tuple[WantedStructure, ...] = ()

    def stamp(self) -> str:
        """Changes with every file that goes in, and with what is asked for."""
        files = {frame.file: None for frame in self.stack.frames} | {file: None for file in self.drawings}
        asked = [VERSION, len(self.stack.frames), sorted(file.stamp for file in files), list(map(asdict, self.wanted))]
        return hashlib.sha256(json.dumps(asked).encode("utf-8", "backslashreplace")).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a stack."""

    reason: str = ""  # why it is refused
    notes: tuple[str, ...] = ()
    try_again: bool = False  # whether the cause lies outside of the files


def convert(job: Job) -> Outcome:
    """Write the scan (and labels) of a stack, unless an earlier run has done so from the same files."""
    stamp = job.stamp()
    known = _known(job, stamp)
    if known is not None:
        return known
    try:
        outcome = Outcome(notes=tuple(_write(job)))
    except UnavailableScan as error:
        return Outcome(str(error), try_again=True)
    except RejectedScan as error:
        outcome = Outcome(str(error))
    except (MemoryError, OSError) as error:
        return Outcome(f"cannot be read now: {type(error).__name__}: {error}", try_again=True)
    except Exception as error:  # whatever a reader raises for one series, the others go on
        outcome = Outcome(f"damaged: {type(error).__name__}: {str(error)[:120]}")
    if outcome.reason:
        for path in filter(None, (job.image, job.labels)):
            path.unlink(missing_ok=True)
    write_json(job.state, {"stamp": stamp, "reason": outcome.reason, "notes": list(outcome.notes)})
    return outcome


def _known(job: Job, stamp: str) -> Outcome | None:
    try:
        state = json.loads(job.state.read_text(encoding="utf-8"))
        outcome = Outcome(state["reason"], tuple(state["notes"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    written = all(path.is_file() for path in (job.image, job.labels) if path is not None)
    return outcome if state.get("stamp") == stamp and (outcome.reason or written) else None


def _write(job: Job) -> list[str]:
    stack, notes = _without_doubles(job.stack)
    frames = stack.frames
    rows, columns = (int(stack.first.shown[name]) for name in ("Rows", "Columns"))
    grid = stack_grid([_given(frame.position) for frame in frames], _given(frames[0].orientation),
                      _given(frames[0].spacing), (rows, columns))  # fmt: skip
    array, affine = read_planes([frames[index] for index in grid.order], rows, columns), grid.affine
    if not np.isfinite(array).all() or array.min() == array.max():
        raise RejectedScan("constant image" if np.isfinite(array).all() else "voxels that are NaN or infinite")
    if stack.first.shown.get("Modality") == "PT":
        factor, how = _suv_factor(frames)
        array *= factor
        notes.append(how)
    if grid.tilt_degrees:
        array, affine = straighten(array, affine)
        notes.append(f"gantry tilt of {grid.tilt_degrees:.1f} degrees: resampled to right angles")
    labels = None
    if job.labels is not None:
        with on_disk(list(job.drawings)) as paths:
            labels, told = draw_labels([read_whole(path) for path in paths], job.wanted, array.shape, affine)
        notes += told
    _save(job.image, _smallest(array), affine)
    if job.labels is not None and labels is not None:
        _save(job.labels, labels, affine)
    return notes


def _without_doubles(stack: Stack) -> tuple[Stack, list[str]]:
    """The stack with one of several equal planes at a place; where they differ, what they are is not known."""
    for group in places_with_several(stack.frames):
        if not same_pixels(group):
            raise RejectedScan(f"{len(group)} different images at one place, and nothing tells them apart")
        stack = without(stack, group[1:])
    return stack, [f"{stack.doubles} planes were there twice"] if stack.doubles else []


def _suv_factor(frames: tuple[Frame, ...]) -> tuple[float, str]:
    headers = []
    for file in dict.fromkeys(frame.file for frame in frames):
        with open_file(file) as stream:
            headers.append(require_pydicom().dcmread(stream, stop_before_pixels=True, force=True))
    return suv_factor(headers)


def _smallest(array: np.ndarray) -> np.ndarray:
    """Whole numbers as int16 where they fit; CT takes half of the room then."""
    limits = np.iinfo(np.int16)
    whole = array.min() >= limits.min and array.max() <= limits.max and bool((array == np.rint(array)).all())
    return array.astype(np.int16) if whole else array


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write axes (column, row, plane) with their affine in LPS as NIfTI (RAS), atomically and with no other header."""
    image = nibabel.Nifti1Image(array, LPS_TO_RAS @ affine, dtype=array.dtype)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header["xyzt_units"] = _MM
    with atomic_path(path) as temporary:
        temporary.write_bytes(stored_bytes(image))


def _given(numbers: tuple[float, ...] | None) -> tuple[float, ...]:
    if numbers is None:
        raise RejectedScan("no geometry")
    return numbers
