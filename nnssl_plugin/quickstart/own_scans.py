"""Cuts a few of the user's scans down so that the pipeline takes minutes: which is used for what, and how coarse."""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.plausibility import looks_like_ct
from nnssl_plugin.intake.raw_dataset import case_name
from nnssl_plugin.io.refusals import RejectedScan
from nnssl_plugin.io.scans import ENDINGS, ending_of, load_scan, read_volume
from nnssl_plugin.io.text import printable

log = logging.getLogger(__name__)

MOST_LABELLED, MOST_UNLABELLED = 20, 16
"""Scans with and without labels that are used; more are left out by a seeded choice."""
LEAST_TRAINING = 5
"""nnU-Net splits the training cases into five folds."""
TEST_SHARE = 0.2
MOST_VOXELS = 48**3
"""Voxels of a scan; a larger one is averaged over blocks, first along the axes with the finest spacing."""
MOST_LABELS = 6
"""Labels that are kept, those with the most voxels first."""
SEED = 0


@dataclass(frozen=True)
class Candidate:
    """A scan of the user, and its segmentation where there is one."""

    case: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class SmallCase:
    """A scan at the quickstart's resolution: image and labels (I, J, K) as stored, and their affine in RAS mm."""

    case: str
    image: np.ndarray
    affine: np.ndarray
    label: np.ndarray | None = None


def find_candidates(images: Path, labels: Path | None) -> tuple[list[Candidate], list[str]]:
    """The scans below a folder, each with the segmentation of its name.

    ``labels/SUB/CASE.nii.gz`` belongs to ``images/SUB/CASE.nii.gz`` or ``images/SUB/CASE_0000.nii.gz``; further
    channels (``CASE_0001``) are left out, as a scan of a test case must not get into pretraining.

    Returns:
        the candidates by case name, and what was left out, in words without names of files.

    Raises:
        UserError: a folder is missing or holds no scans, or no segmentation belongs to a scan.
    """
    scans, notes = _files_by_name(images, "--images", apart_from=labels), []
    first = {name[:-5] for name in scans if name.endswith("_0000")}
    channels = [name for name in scans if re.search(r"_\d{4}$", name) and name[:-5] in first and name[-4:] != "0000"]
    if channels:
        log.warning("Further channels such as %s are not used.", printable(channels[0]))
        notes.append(f"{len(channels)} further channels are not used: one per case is.")
    segmentations = _files_by_name(labels, "--labels") if labels else {}
    candidates, taken = [], Counter()
    for name in (name for name in scans if name not in channels):
        key = name[:-5] if name.endswith("_0000") else name
        case = case_name(key)
        taken[case.casefold()] += 1
        again = taken[case.casefold()]
        label = segmentations.pop(key, None) or segmentations.pop(name, None)
        candidates.append(Candidate(case if again == 1 else f"{case}_{again}", scans[name], label))
    if labels and not any(c.label for c in candidates):
        raise UserError(
            f"No file in {labels} is named like a scan in {images}, for example {next(iter(scans))}.",
            "Name the segmentation of CASE.nii.gz or CASE_0000.nii.gz CASE.nii.gz.",
        )
    if segmentations:
        log.warning("Segmentations such as %s belong to no scan.", printable(next(iter(segmentations))))
        notes.append(f"{len(segmentations)} segmentations belong to no scan.")
    return sorted(candidates, key=lambda c: c.case), notes


def choose(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate], list[Candidate], list[str]]:
    """Test, training and unlabelled cases by a seeded choice, and what was left out."""
    rng, notes, chosen = np.random.default_rng(SEED), [], []
    for kind, most, wanted in (("labelled", MOST_LABELLED, True), ("unlabelled", MOST_UNLABELLED, False)):
        group = [c for c in candidates if (c.label is not None) == wanted]
        picked = [group[i] for i in rng.permutation(len(group))[:most]]
        if len(picked) < len(group):
            notes.append(f"{len(picked)} of {len(group)} {kind} scans are used, chosen at random (seed {SEED}).")
        chosen.append(picked)
    labelled, unlabelled = chosen
    tests = math.ceil(TEST_SHARE * len(labelled))
    return labelled[:tests], labelled[tests:], unlabelled, notes


def load_small(candidates: Sequence[Candidate], seen: set[str]) -> tuple[list[SmallCase], list[str], int, int]:
    """Read scans and their segmentations at the quickstart's resolution.

    Args:
        candidates: what to read.
        seen: hashes of the voxels so far; a scan with the voxels of another is left out.

    Returns:
        the cases; what was left out and why (names of files are logged instead); how many were made coarser; how many
        look like CT.
    """
    cases, notes, coarser, ct = [], [], 0, 0
    for candidate in tqdm(candidates, desc="scans", unit="scan"):
        try:
            small, factors, is_ct = _load_one(candidate)
        except RejectedScan as reason:
            log.warning("%s is left out: %s.", printable(candidate.image.name), printable(str(reason)))
            notes.append(f"A scan is left out: {str(reason).partition(':')[0]}.")
            continue
        voxels = hashlib.sha256(small.image.tobytes()).hexdigest()
        if voxels in seen:
            log.warning("%s is left out: it has the voxels of another scan.", printable(candidate.image.name))
            notes.append("A scan is left out: it has the voxels of another.")
            continue
        seen.add(voxels)
        cases.append(small)
        coarser += max(factors) > 1
        ct += is_ct
    return cases, notes, coarser, ct


def number_labels(cases: Sequence[SmallCase]) -> tuple[dict[int, int], list[str]]:
    """Value in the user's segmentations → 1, 2, … in order of the values; and what was left out."""
    voxels: Counter[int] = Counter()
    for case in cases:
        values, counts = np.unique(case.label[case.label > 0], return_counts=True)
        voxels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    kept = sorted(value for value, _ in voxels.most_common(MOST_LABELS))
    left_out = sorted(set(voxels) - set(kept))
    notes = [f"Of {len(voxels)} labels the {MOST_LABELS} largest are used ({_listed(kept)})."] if left_out else []
    return {value: number for number, value in enumerate(kept, 1)}, notes


def save_small(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def block_factors(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers of voxels to average along each axis, so that at most :data:`MOST_VOXELS` are left."""
    factors = [1] * len(shape)
    while math.prod(n // f for n, f in zip(shape, factors, strict=True)) > MOST_VOXELS:
        # at least two voxels stay along each axis
        free = [a for a in range(len(shape)) if shape[a] // (factors[a] + 1) >= 2]
        finest = min(free, key=lambda a: spacing_mm[a] * factors[a])
        factors[finest] += 1
    return tuple(factors)


def coarsen(array: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Means over blocks; voxels beyond the last whole block are dropped."""
    shape = [n // f for n, f in zip(array.shape, factors, strict=True)]
    whole = array[tuple(slice(n * f) for n, f in zip(shape, factors, strict=True))]
    blocks = whole.reshape([size for pair in zip(shape, factors, strict=True) for size in pair])
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def _load_one(candidate: Candidate) -> tuple[SmallCase, tuple[int, ...], bool]:
    scan = load_scan(candidate.image)
    factors = block_factors(scan.array.shape, scan.spacing)
    affine = scan.image.affine @ _block_affine(factors)
    label = None
    if candidate.label is not None:
        stored, label_affine = read_volume(candidate.label)
        _check_segmentation(stored, label_affine, scan)
        middles = tuple(slice(f // 2, n // f * f, f) for n, f in zip(stored.shape, factors, strict=True))
        label = np.rint(stored[middles]).astype(np.int32)
    small = SmallCase(candidate.case, coarsen(scan.array, factors), affine, label)
    return small, factors, looks_like_ct(scan.array)


def _check_segmentation(stored, affine, scan):
    if stored.shape != scan.array.shape or not np.allclose(affine, scan.image.affine, atol=1e-2):
        raise RejectedScan(f"its segmentation has another grid, {stored.shape} instead of {scan.array.shape}")
    if not np.isfinite(stored).all() or stored.min() < 0 or np.abs(stored - np.rint(stored)).max() > 1e-3:
        raise RejectedScan("its segmentation holds other values than whole numbers from 0")


def _block_affine(factors: Sequence[int]) -> np.ndarray:
    """Index of a block → index of its middle in voxels."""
    matrix = np.diag([*map(float, factors), 1.0])
    matrix[:3, 3] = [(f - 1) / 2 for f in factors]
    return matrix


def _files_by_name(folder: Path, flag: str, apart_from: Path | None = None) -> dict[str, Path]:
    """Relative path without its ending → file, in order."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", f"Give a folder of scans: {flag} DIR")
    apart = apart_from.resolve() if apart_from else None
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        other = apart is not None and path.resolve().is_relative_to(apart)
        if ending_of(path) is not None and path.is_file() and not hidden and not other:
            found.setdefault(relative.as_posix()[: -len(ending_of(path))], path)
    if not found:
        raise UserError(f"{folder} holds no scans.", f"Scans end in {', '.join(ENDINGS)}: {flag} DIR")
    return found


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
