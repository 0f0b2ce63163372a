"""One random slice per volume and its text (Med3DInsight, section III-A), for any nnU-Net raw dataset.

Slices are shown as a radiologist sees them: in axial and coronal slices the patient's right is on the left side of the
picture; the top is anterior (axial) or superior (coronal, sagittal); in sagittal slices anterior is on the left.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from skimage.transform import resize
from tqdm import tqdm

from nnssl_plugin.captions.captioners import Captioner, SliceFacts, modality_of
from nnssl_plugin.data.triplets import TRIPLETS_FILE, Triplet, read_triplets, write_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.scans import RejectedScan, ending_of, read_volume
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.planes import PLANES, RAS_AXIS, stored_axis
from nnssl_plugin.nnunet.raw_folders import training_files

log = logging.getLogger(__name__)

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


def choose_triplet(case: str, body: np.ndarray, affine: np.ndarray, *, seed: int) -> tuple[str, int, int]:
    """Draw one slice: a plane uniformly, then a slice uniformly among those of it that hold some body.

    The draw depends on (seed, case) and the mask alone, so adding cases leaves the others as they are. The paper draws
    from all slices; here slices of air are left out, because nothing can be said about them.

    Args:
        case: name of the case.
        body: (I, J, K), true inside the body or any label; all false stands for the whole image.
        affine: (4, 4) voxel-to-world matrix in RAS mm.
        seed: of the dataset.

    Returns:
        plane, index along the stored axis of that plane, and the length of that axis.
    """
    digest = hashlib.sha256(f"{seed}:{case}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    plane = PLANES[rng.integers(len(PLANES))]
    axis, _ = stored_axis(affine, plane)
    others = tuple(other for other in range(3) if other != axis)
    candidates = np.flatnonzero(np.any(body, axis=others)) if np.any(body) else np.arange(body.shape[axis])
    return plane, int(candidates[rng.integers(len(candidates))]), body.shape[axis]


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
    raw_folder: Path, captioner: Captioner, *, seed: int = 0, body_part: str | None = None
) -> CaptionSummary:
    """Choose and describe one slice per case, and write ``triplets.jsonl``.

    A line stays as it is where another captioner (or a person) wrote it, or where this captioner wrote it with this
    seed and, if given, this body part.

    Args:
        raw_folder: any nnU-Net raw dataset of 3D images; channel 0 is described.
        captioner: who writes the new texts.
        seed: draws the slices.
        body_part: goes into the new texts; None leaves it out and keeps the lines that have one.

    Raises:
        UserError: the dataset has no training cases, or an image cannot be read.
    """
    files = training_files(raw_folder)
    if not files:
        raise UserError(f"{raw_folder} has no training cases.", "Prepare some scans first: nnssl_plugin prepare")
    modality = modality_of(read_dataset_file(raw_folder / "dataset.json", needed=("channel_names",)))
    present = read_triplets(raw_folder) if (raw_folder / TRIPLETS_FILE).is_file() else {}
    kept = {case: line for case, line in present.items() if _stays(line, captioner.name, seed, body_part)}
    todo = [case for case in files if case not in kept]
    made = dict(kept)
    try:
        for case in tqdm(todo, desc="caption", unit="case"):
            image, label = files[case]
            made[case] = _describe(case, image, label, captioner, modality, seed=seed, body_part=body_part or "")
    finally:
        # cases that an interruption left undone keep the line they had
        path = write_triplets(raw_folder, [line for _, line in sorted({**present, **made}.items())])
    return CaptionSummary(path=path, added=len(todo), kept=len(kept))


def triplet_pictures(raw_folder: Path, triplets: dict[str, Triplet]) -> Iterator[tuple[Triplet, np.ndarray]]:
    """Each triplet of a case that the dataset still has, with its picture."""
    files = training_files(raw_folder)
    for case, triplet in triplets.items():
        if case in files:
            yield triplet, slice_image(load_volume(files[case][0]), triplet)
        else:
            log.warning("%s names case %s, which the dataset does not have; it is left out.", TRIPLETS_FILE, case)


def _stays(line: Triplet, captioner: str, seed: int, body_part: str | None) -> bool:
    return line.captioner != captioner or (line.seed == seed and body_part in (None, line.body_part))


def _describe(
    case: str, image: Path, label: Path, captioner: Captioner, modality: str, *, seed: int, body_part: str
) -> Triplet:
    volume = load_volume(image)
    body = load_volume(label).array > 0 if label.is_file() else np.zeros(volume.array.shape, dtype=bool)
    if body.shape != volume.array.shape:
        raise UserError(f"Case {case}: label {body.shape} and image {volume.array.shape} differ.", "Mend the label.")
    plane, index, n_slices = choose_triplet(case, body, volume.affine, seed=seed)
    draft = Triplet(case, plane, index, n_slices, "", captioner.name, seed, body_part)
    text = captioner.describe(slice_image(volume, draft), slice_facts(volume, draft, modality=modality))
    return Triplet(case, plane, index, n_slices, " ".join(text.split()), captioner.name, seed, body_part)


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
