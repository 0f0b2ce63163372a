"""Generated scans that look like anatomy, for the quickstart and the tests: no download, no patient.

A subject is an ellipsoidal body with nested organs, all bent by one smooth displacement, seen through one or several
contrasts with a bias field and noise. Two small structures are labelled (1 and 2) and present in every subject.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter

from nnssl_plugin.files import atomic_path


class Organ(NamedTuple):
    """An ellipsoid in a body of half axes 1; z from feet to head, y from back to front, x from left to right."""

    tissue: int
    """Column of :data:`CONTRASTS`."""
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    label: int = 0


BODY = Organ(1, (0, 0, 0), (1, 1, 1))
ORGANS = (
    Organ(2, (0.05, 0.02, 0.0), (0.85, 0.84, 0.86)),
    Organ(3, (0.45, 0.10, -0.42), (0.38, 0.46, 0.30)),
    Organ(3, (0.45, 0.10, 0.42), (0.38, 0.46, 0.30)),
    Organ(4, (-0.25, 0.20, 0.30), (0.52, 0.54, 0.50)),
    Organ(5, (-0.05, 0.48, -0.36), (0.22, 0.22, 0.22)),
    Organ(6, (0.0, -0.62, 0.0), (0.80, 0.17, 0.15)),
    Organ(8, (-0.32, -0.16, -0.40), (0.46, 0.42, 0.36), label=1),
    Organ(7, (-0.26, 0.20, 0.32), (0.36, 0.38, 0.36), label=2),
)
"""Painted in this order, so the labelled ones lie on top."""

CONTRASTS = np.array([
    [0, 0.75, 0.40, 0.10, 0.55, 0.65, 0.85, 0.22, 1.20],
    [0, 0.70, 0.35, 0.08, 0.28, 0.60, 0.45, 1.10, 0.80],
    [0, 0.30, 0.55, 0.05, 0.65, 0.40, 0.70, 0.90, 1.15],
    [0, 0.60, 0.70, 0.12, 0.50, 0.85, 0.30, 0.40, 1.05],
])
"""Intensity of each tissue (0 is air) in each channel, as different sequences show the same anatomy."""


def phantom(
    rng: np.random.Generator, *, shape: Sequence[int], spacing_mm: Sequence[float], channels: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """One subject, another at each call.

    Args:
        rng: the only source of randomness.
        shape: voxels (z, y, x), at least 16 each so that the labelled structures have a core.
        spacing_mm: voxel size (z, y, x) in mm.
        channels: contrasts of the same anatomy, at most ``len(CONTRASTS)``.

    Returns:
        the image (C, z, y, x) float32 in arbitrary units, about 0 to 2000, and the labels (z, y, x) uint8 in {0, 1, 2}.

    Raises:
        ValueError: for a smaller shape or more channels.
    """
    if min(shape) < 16:
        raise ValueError(f"a phantom needs at least 16 voxels along each axis, not {tuple(shape)}")
    if not 1 <= channels <= len(CONTRASTS):
        raise ValueError(f"a phantom has 1 to {len(CONTRASTS)} channels, not {channels}")
    tissue, labels = _anatomy(rng, shape, spacing_mm)
    image = np.stack([_seen(rng, contrast[tissue], spacing_mm) for contrast in CONTRASTS[:channels]])
    return image.astype(np.float32), labels


def write_phantoms(
    folder: str | Path,
    count: int,
    *,
    seed: int,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    labels_folder: str | Path | None = None,
    channels: int = 1,
) -> list[Path]:
    """Write ``count`` subjects as ``phantom_000_0000.nii.gz`` (subject, channel), in RAS, named as nnU-Net expects.

    Subject *i* depends on ``(seed, i)`` alone.

    Args:
        folder: where the images go; made if it is absent.
        count: number of subjects.
        seed: another seed gives other subjects.
        shape: voxels (z, y, x).
        spacing_mm: voxel size (z, y, x) in mm.
        labels_folder: where the labels go, as ``phantom_000.nii.gz``; ``None`` writes no labels.
        channels: images per subject.

    Returns:
        the paths of the images.
    """
    paths = []
    for index in range(count):
        image, labels = phantom(
            np.random.default_rng((seed, index)), shape=shape, spacing_mm=spacing_mm, channels=channels
        )
        for channel, values in enumerate(image):
            paths.append(Path(folder, f"phantom_{index:03d}_{channel:04d}.nii.gz"))
            _write(paths[-1], values, spacing_mm)
        if labels_folder is not None:
            _write(Path(labels_folder, f"phantom_{index:03d}.nii.gz"), labels, spacing_mm)
    return paths


def _anatomy(rng, shape, spacing_mm):
    """Tissue and label of each voxel."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    body = np.array(BODY.radii) * rng.uniform(0.80, 0.92, 3)
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) / body[:, None, None, None]
    grid += np.stack([0.05 * _smooth_noise(rng, shape, spacing_mm, length=0.2) for _ in range(3)])

    tissue = np.zeros(shape, np.uint8)
    labels = np.zeros(shape, np.uint8)
    tissue[_inside(BODY, grid)] = BODY.tissue
    for organ in ORGANS:
        moved = organ._replace(
            centre=tuple(organ.centre + rng.normal(0, 0.03, 3)), radii=tuple(organ.radii * rng.uniform(0.85, 1.15, 3))
        )
        where = _inside(moved, grid)
        tissue[where] = organ.tissue
        labels[where] = organ.label
    return tissue, labels


def _inside(organ, grid):
    offset = [(grid[axis] - organ.centre[axis]) / organ.radii[axis] for axis in range(3)]
    return sum(o * o for o in offset) <= 1


def _seen(rng, ideal, spacing_mm):
    """What a scanner makes of ideal intensities in [0, 1]: partial volume, texture, bias field, gain, noise."""
    shape = ideal.shape
    blurred = gaussian_filter(ideal, 0.5)
    texture = 1 + 0.06 * _smooth_noise(rng, shape, spacing_mm, length=0.04)
    bias = np.exp(0.15 * _smooth_noise(rng, shape, spacing_mm, length=0.4))
    noise = rng.normal(0, 0.03, (2, *shape))
    magnitude = np.hypot(blurred * texture * bias + noise[0], noise[1])  # Rician, as in MR
    return magnitude * rng.uniform(400, 1200)


def _smooth_noise(rng, shape, spacing_mm, *, length):
    """Noise of mean 0 and standard deviation 1, correlated over ``length`` times the smallest extent (in mm)."""
    extent = min(n * s for n, s in zip(shape, spacing_mm, strict=True))
    noise = gaussian_filter(rng.normal(size=shape), [length * extent / s for s in spacing_mm], mode="nearest")
    return (noise - noise.mean()) / noise.std()


def _write(path, values_zyx, spacing_mm):
    affine = np.diag([*reversed([float(s) for s in spacing_mm]), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(values_zyx.shape[::-1]) - 1) / 2
    with atomic_path(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(values_zyx.transpose(2, 1, 0), affine), temporary)
