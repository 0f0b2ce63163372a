"""Random slices of every volume and their texts (Med3DInsight, section III-A), for any nnU-Net raw dataset.

Slices are shown as a radiologist sees them: in axial and coronal slices the patient's right is on the left side of the
picture; the top is anterior (axial) or superior (coronal, sagittal); in sagittal slices anterior is on the left.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import nibabel
import numpy as np
from skimage.transform import resize
from tqdm import tqdm

from nnssl_plugin.captions.captioners import Captioner, SliceFacts, modality_of, signature
from nnssl_plugin.data.cases import first_channels
from nnssl_plugin.data.triplets import TRIPLETS_FILE, Triplet, by_case, read_triplets, write_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.scans import RejectedScan, ending_of, read_volume
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.planes import PLANES, RAS_AXIS, stored_axis
from nnssl_plugin.nnunet.raw_folders import training_files

log = logging.getLogger(__name__)

SLICES = 8
"""Slices per case. The paper takes one for ever: then whatever tells the case names its slice, and the volume need not
be looked at. Here a step sees one of several."""

SECONDS_BETWEEN_WRITES = 60
"""A captioner may need seconds for a slice: this much of its work is lost at most."""

# axes of a RAS slice (after its normal is dropped) are ascending: sagittal (A, S), coronal (R, S), axial (R, A)
_DROPPED_AXES = {plane: tuple(axis for axis in range(3) if axis != RAS_AXIS[plane]) for plane in PLANES}


@dataclass(frozen=True)
class Volume:
    """A 3D image as stored on disk."""

    array: np.ndarray  # (I, J, K) float32
    affine: np.ndarray  # (4, 4), voxels to RAS mm


@dataclass(frozen=True)
class CaptionSummary:
    """What :func:`caption_dataset` did."""

    path: Path
    added: int
    kept: int


def load_volume(path: Path) -> Volume:
    """Read an image of a raw dataset as stored.

    Raises:
        UserError: it is no readable 3D volume with a position in space (2D datasets have no planes).
    """
    if ending_of(path) is None:
        raise UserError(f"{path} is no 3D volume with a position in space.", "Triplets need .nii.gz, .nrrd or .mha.")
    try:
        return Volume(*read_volume(path))
    except RejectedScan as error:
        raise UserError(f"{path}: {error}", "Mend or remove the case, then caption again.") from error


def choose_slices(
    case: str, body: np.ndarray, affine: np.ndarray, *, seed: int, count: int = SLICES
) -> list[tuple[str, int, int]]:
    """Draw slices: the planes in turn, in random order, and uniformly among the slices of a plane that hold some body.

    The draw depends on (seed, case) and the mask alone, so adding cases leaves the others as they are; a larger count
    adds slices to those of a smaller one. The paper draws from all slices; here slices of air are left out, because
    nothing can be said about them.

    Args:
        case: name of the case.
        body: (I, J, K), true inside the body or any label; all false stands for the whole image.
        affine: (4, 4) voxel-to-world matrix in RAS mm.
        seed: of the dataset.
        count: number of slices.

    Returns:
        plane, index along the stored axis of that plane, and the length of that axis, of each slice; fewer than
        ``count`` where the case has no more.
    """
    digest = hashlib.sha256(f"{seed}:{case}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    first = PLANES[rng.integers(len(PLANES))]
    left = {plane: _slices_with_body(body, affine, plane) for plane in PLANES}
    drawn = [_take(left[first], rng)]
    planes = [first]
    others = [PLANES[number] for number in rng.permutation(len(PLANES)) if PLANES[number] != first]
    for plane in cycle((*others, first)):
        if len(drawn) >= count or not any(left.values()):
            break
        if left[plane]:
            drawn.append(_take(left[plane], rng))
            planes.append(plane)
    return [(p, index, body.shape[stored_axis(affine, p)[0]]) for p, index in zip(planes, drawn, strict=True)]


def _slices_with_body(body: np.ndarray, affine: np.ndarray, plane: str) -> list[int]:
    axis, _ = stored_axis(affine, plane)
    others = tuple(other for other in range(3) if other != axis)
    return (np.flatnonzero(np.any(body, axis=others)) if np.any(body) else np.arange(body.shape[axis])).tolist()


def _take(left: list[int], rng: np.random.Generator) -> int:
    return left.pop(rng.integers(len(left)))


def slice_image(volume: Volume, triplet: Triplet) -> np.ndarray:
    """The slice of a triplet as a picture: oriented for viewing, square pixels, its range stretched to 0–255.

    Args:
        volume: the image as stored.
        triplet: gives plane and slice.

    Returns:
        (H, W, 3) uint8, three equal channels; pixels as large as the smaller voxel edge in the slice.

    Raises:
        UserError: the triplet's slice does not fit the image.
    """
    axis, _ = stored_axis(volume.affine, triplet.plane)
    if volume.array.shape[axis] != triplet.n_slices:
        raise UserError(
            f"Case {triplet.case}: the triplet counts {triplet.n_slices} {triplet.plane} slices, "
            f"the image has {volume.array.shape[axis]}.",
            f"Delete its line in {TRIPLETS_FILE} and caption again.",
        )
    pixels = _as_viewed(volume, triplet)
    finite = np.isfinite(pixels)
    low, high = (pixels[finite].min(), pixels[finite].max()) if finite.any() else (0.0, 0.0)
    pixels = (np.where(finite, pixels, low) - low) / max(high - low, np.finfo(np.float32).tiny)
    width_mm, height_mm = _viewed_extent(volume, triplet.plane)
    edge = min(height_mm / pixels.shape[0], width_mm / pixels.shape[1])
    shape = (max(round(height_mm / edge), 1), max(round(width_mm / edge), 1))
    pixels = resize(pixels, shape, order=1, mode="edge", anti_aliasing=False, preserve_range=True)
    return np.repeat(np.rint(pixels * 255).astype(np.uint8)[..., None], 3, axis=2)


def slice_facts(volume: Volume, triplet: Triplet, *, modality: str) -> SliceFacts:
    """What is known about the slice of a triplet without looking at it."""
    axis, reversed_ = stored_axis(volume.affine, triplet.plane)
    last = triplet.n_slices - 1
    index = last - triplet.slice if reversed_ else triplet.slice
    return SliceFacts(
        case=triplet.case,
        modality=modality,
        plane=triplet.plane,
        position=index / last if last else 0.5,
        extent_mm=_viewed_extent(volume, triplet.plane),
        spacing_mm=float(nibabel.affines.voxel_sizes(volume.affine)[axis]),
        body_part=triplet.body_part,
    )


def caption_dataset(
    raw_folder: Path, captioner: Captioner, *, seed: int = 0, slices: int = SLICES, body_part: str | None = None
) -> CaptionSummary:
    """Choose and describe slices of every case, and write ``triplets.jsonl``.

    A line stays as it is where another captioner (or a person) wrote it, or where this captioner wrote it with this
    seed, these options and, if given, this body part. A case that only others described gets no further lines.

    Args:
        raw_folder: any nnU-Net raw dataset of 3D images; the first channel that a case has is described.
        captioner: who writes the new texts.
        seed: draws the slices.
        slices: per case; a case that has more keeps them.
        body_part: goes into the new texts; None leaves it out and keeps the lines that have one.

    Raises:
        UserError: the dataset has no training cases, an image cannot be read, or the captioner fails.
    """
    channels = first_channels(raw_folder)
    files = training_files(raw_folder, channels)
    if not files:
        raise UserError(f"{raw_folder} has no training cases.", "Prepare some scans first: nnssl_plugin prepare")
    if slices < 1:
        raise UserError(f"--slices {slices}: every case needs one.", "Give 1 or more; 8 is the default.")
    dataset_json = read_dataset_file(raw_folder / "dataset.json", needed=("channel_names",))
    lines = by_case(read_triplets(raw_folder)) if (raw_folder / TRIPLETS_FILE).is_file() else {}
    kept = {case: _kept(lines.get(case, ()), captioner, seed=seed, body_part=body_part) for case in files}
    todo = [case for case in files if len(kept[case]) < slices and not _is_foreign(lines.get(case, ()), captioner)]
    added, written = 0, time.monotonic()
    try:
        for case in tqdm(todo, desc="caption", unit="case"):
            new = _describe(
                case,
                files[case],
                captioner,
                modality_of(dataset_json, channels.get(case, 0)),
                kept=kept[case],
                seed=seed,
                slices=slices,
                body_part=body_part or "",
            )
            lines[case] = [*kept[case], *new]
            added += len(new)
            if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                _write(raw_folder, lines)
                written = time.monotonic()
    finally:
        path = _write(raw_folder, lines)  # cases that an interruption left undone keep the lines they had
    return CaptionSummary(path=path, added=added, kept=sum(map(len, kept.values())))


def triplet_pictures(raw_folder: Path, triplets: Sequence[Triplet]) -> Iterator[tuple[Triplet, np.ndarray]]:
    """Each triplet of a case that the dataset still has, with its picture; case by case."""
    files = training_files(raw_folder, first_channels(raw_folder))
    for case, slices in by_case(triplets).items():
        if case not in files:
            log.warning("%s names case %s, which the dataset does not have; it is left out.", TRIPLETS_FILE, case)
            continue
        volume = load_volume(files[case][0])
        for triplet in slices:
            yield triplet, slice_image(volume, triplet)


def _write(raw_folder: Path, lines: dict[str, list[Triplet]]) -> Path:
    return write_triplets(raw_folder, [line for _, of_case in sorted(lines.items()) for line in of_case])


def _wrote(captioner: Captioner, line: Triplet) -> bool:
    return line.captioner.split(" ")[0] == captioner.name


def _kept(lines: Sequence[Triplet], captioner: Captioner, *, seed: int, body_part: str | None) -> list[Triplet]:
    """The lines of a case that stay as they are."""
    mine = signature(captioner)
    return [
        line
        for line in lines
        if not _wrote(captioner, line)
        or (line.captioner == mine and line.seed == seed and body_part in (None, line.body_part))
    ]


def _is_foreign(lines: Sequence[Triplet], captioner: Captioner) -> bool:
    """Whether a case has lines, and none of this captioner."""
    return bool(lines) and not any(_wrote(captioner, line) for line in lines)


def _describe(
    case: str,
    files: tuple[Path, Path],
    captioner: Captioner,
    modality: str,
    *,
    kept: Sequence[Triplet],
    seed: int,
    slices: int,
    body_part: str,
) -> list[Triplet]:
    """New triplets of a case, beside those that are kept, up to ``slices``."""
    image, label = files
    volume = load_volume(image)
    body = load_volume(label).array > 0 if label.is_file() else np.zeros(volume.array.shape, dtype=bool)
    if body.shape != volume.array.shape:
        raise UserError(f"Case {case}: label {body.shape} and image {volume.array.shape} differ.", "Mend the label.")
    there = {line.key for line in kept}
    drawn = choose_slices(case, body, volume.affine, seed=seed, count=slices)
    new = [
        Triplet(case, *place, text="", captioner=signature(captioner), seed=seed, body_part=body_part)
        for place in drawn
        if (case, *place[:2]) not in there
    ][: slices - len(kept)]
    if not new:
        return []
    facts = [slice_facts(volume, triplet, modality=modality) for triplet in new]
    texts = captioner.describe([slice_image(volume, triplet) for triplet in new], facts)
    _check_texts(texts, new, captioner)
    return [replace(triplet, text=" ".join(text.split())) for triplet, text in zip(new, texts, strict=True)]


def _check_texts(texts: Sequence[str], triplets: Sequence[Triplet], captioner: Captioner) -> None:
    case = triplets[0].case
    if len(texts) != len(triplets):
        problem = f"Captioner {captioner.name} gave {len(texts)} texts for {len(triplets)} slices of {case}."
        raise UserError(problem, "describe() returns one text per slice, in their order.")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"Captioner {captioner.name} gave an empty text for a slice of {case}.", "Mend the captioner.")


def _as_viewed(volume: Volume, triplet: Triplet) -> np.ndarray:
    """(rows, columns): rows from superior (axial: anterior) down, columns from right (sagittal: anterior)."""
    axis, _ = stored_axis(volume.affine, triplet.plane)
    start = [slice(None)] * 3
    start[axis] = slice(triplet.slice, triplet.slice + 1)
    ras = nibabel.apply_orientation(volume.array[tuple(start)], nibabel.io_orientation(volume.affine))
    return np.squeeze(ras, axis=RAS_AXIS[triplet.plane]).T[::-1, ::-1]


def _viewed_extent(volume: Volume, plane: str) -> tuple[float, float]:
    """Width and height of a slice in mm."""
    stored = [stored_axis(volume.affine, other)[0] for other in sorted(PLANES, key=RAS_AXIS.get)]
    extent = nibabel.affines.voxel_sizes(volume.affine) * volume.array.shape
    width, height = (float(extent[stored[ras_axis]]) for ras_axis in _DROPPED_AXES[plane])
    return width, height
