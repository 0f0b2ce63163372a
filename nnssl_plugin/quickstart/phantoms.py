"""Generated scans that look like anatomy, for the quickstart and the tests: no download, no patient.

A subject is a trunk from abdomen to lungs: skin and fat, muscle, spine with its canal, vessels, lungs, liver, stomach,
spleen and kidneys. Every organ has a place, size, tilt and outline of its own; all are bent by one smooth displacement,
seen through one or several contrasts with a bias field and noise. The liver is labelled 1, both kidneys 2; they are
present in every subject.

A second anatomy is a head after skull stripping in four contrasts, for what learns across modalities.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter

from nnssl_plugin.io.files import atomic_path


class Organ(NamedTuple):
    """An ellipsoid in a body of half axes 1; z from feet to head, y from back to front, x from left to right."""

    tissue: int
    """Column of :data:`CONTRASTS`."""
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    label: int = 0


BODY = Organ(1, (0, 0, 0), (1.8, 1, 1))
"""A trunk: the field of view cuts it at both ends."""
ORGANS = (
    Organ(2, (0.0, 0.0, 0.0), (1.9, 0.86, 0.88)),  # muscle
    Organ(4, (0.0, 0.12, 0.0), (1.9, 0.64, 0.74)),  # cavity
    Organ(3, (0.80, 0.08, -0.42), (0.52, 0.56, 0.33)),  # lungs
    Organ(3, (0.80, 0.08, 0.42), (0.52, 0.56, 0.33)),
    Organ(7, (0.86, 0.22, -0.08), (0.38, 0.30, 0.26)),  # heart
    Organ(5, (0.02, 0.34, -0.38), (0.40, 0.26, 0.26)),  # stomach and what it holds
    Organ(10, (0.02, 0.36, -0.38), (0.26, 0.14, 0.14)),
    Organ(11, (-0.02, -0.20, -0.54), (0.34, 0.22, 0.15)),  # spleen
    Organ(6, (0.0, -0.54, 0.0), (1.9, 0.19, 0.19)),  # spine and canal
    Organ(10, (0.0, -0.66, 0.0), (1.9, 0.06, 0.07)),
    Organ(9, (0.0, -0.26, -0.10), (1.9, 0.09, 0.08)),  # vessels
    Organ(9, (0.0, -0.26, 0.10), (1.9, 0.08, 0.09)),
    Organ(8, (0.10, 0.14, 0.40), (0.50, 0.46, 0.38), label=1),  # liver
    Organ(12, (-0.56, -0.24, 0.44), (0.42, 0.27, 0.25), label=2),  # kidneys
    Organ(12, (-0.46, -0.24, -0.44), (0.46, 0.28, 0.26), label=2),
)
"""Painted in this order, so what is labelled lies on top."""

CONTRASTS = np.array(
    [
        [0, 0.42, 0.34, 0.06, 0.48, 0.30, 0.40, 0.52, 0.88, 1.00, 0.16, 0.62, 1.25],
        [0, 0.70, 0.30, 0.06, 0.60, 0.38, 0.42, 0.50, 0.95, 0.10, 1.15, 0.80, 0.40],
        [0, 0.30, 0.55, 0.05, 0.42, 0.60, 0.40, 0.75, 1.00, 1.15, 0.20, 0.85, 0.70],
        [0, 0.60, 0.50, 0.10, 0.75, 0.40, 0.85, 0.30, 1.05, 0.20, 0.90, 0.65, 0.36],
    ]
)
"""Intensity of each tissue (0 is air) in each channel, as different sequences show the same anatomy; the first is like
T1 with contrast agent and suppressed fat."""


MODALITIES = ("T1", "T1CE", "T2", "FLAIR")
"""Contrasts of the head."""
HEAD = (
    Organ(1, (0.0, 0.0, 0.0), (0.92, 0.96, 0.90)),  # fluid around the brain
    Organ(2, (0.0, 0.0, 0.0), (0.86, 0.90, 0.84)),  # grey matter
    Organ(3, (0.02, 0.02, -0.38), (0.62, 0.70, 0.36)),  # white matter of each side
    Organ(3, (0.02, 0.02, 0.38), (0.62, 0.70, 0.36)),
    Organ(1, (0.10, 0.0, -0.16), (0.26, 0.44, 0.10)),  # ventricles
    Organ(1, (0.10, 0.0, 0.16), (0.26, 0.44, 0.10)),
    Organ(4, (-0.10, 0.05, -0.34), (0.17, 0.20, 0.12)),  # nuclei
    Organ(4, (-0.10, 0.05, 0.34), (0.17, 0.20, 0.12)),
    Organ(2, (-0.62, -0.52, 0.0), (0.24, 0.30, 0.44)),  # cerebellum
)
LESION = (Organ(5, (0, 0, 0), (0.30, 0.30, 0.28), label=1), Organ(6, (0, 0, 0), (0.15, 0.15, 0.14), label=2))
"""Oedema (1) and its core (2), somewhere in the brain of each subject."""
HEAD_CONTRASTS = np.array(
    [
        [0, 0.18, 0.55, 0.80, 0.65, 0.48, 0.40],
        [0, 0.18, 0.55, 0.80, 0.65, 0.48, 1.10],
        [0, 1.10, 0.65, 0.42, 0.52, 0.90, 0.80],
        [0, 0.15, 0.62, 0.50, 0.55, 1.05, 0.75],
    ]
)
"""Intensity of each tissue of the head in each of :data:`MODALITIES`."""


def head(
    rng: np.random.Generator, *, shape: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """One subject's head in all of :data:`MODALITIES`, 0 outside of the brain, another at each call.

    Args:
        rng: the only source of randomness.
        shape: voxels (z, y, x), at least 16 each.
        spacing_mm: voxel size (z, y, x) in mm.

    Returns:
        the image (4, z, y, x) float32 in arbitrary units, and the labels (z, y, x) uint8: 0, oedema 1, core 2.

    Raises:
        ValueError: for a smaller shape.
    """
    if min(shape) < 16:
        raise ValueError(f"a phantom needs at least 16 voxels along each axis, not {tuple(shape)}")
    grid = _bent_grid(rng, shape, spacing_mm, size=rng.uniform(0.92, 1.0, 3), bend=0.03)
    tissue, labels = _painted(rng, HEAD, grid, spread=0.25)
    place = np.array([rng.uniform(-0.2, 0.4), rng.uniform(-0.4, 0.4), rng.choice([-1, 1]) * rng.uniform(0.25, 0.5)])
    for part in LESION:
        where = _individual(rng, part._replace(centre=tuple(place)), grid, spread=0.5) & (tissue > 0)
        tissue[where], labels[where] = part.tissue, part.label
    image = np.stack([_seen(rng, contrast[tissue], spacing_mm) for contrast in HEAD_CONTRASTS])
    return np.where(tissue > 0, image, 0).astype(np.float32), labels


def write_heads(
    folder: str | Path,
    count: int,
    *,
    seed: int,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    labels_folder: str | Path | None = None,
    complete: bool = True,
) -> list[Path]:
    """Write ``count`` heads as ``head_000/T1.nii.gz`` and so on, in RAS; subject *i* depends on ``(seed, i)`` alone.

    Args:
        folder: where the folders of the subjects go.
        count: number of subjects.
        seed: another seed gives other subjects.
        shape: voxels (z, y, x).
        spacing_mm: voxel size (z, y, x) in mm.
        labels_folder: where the labels go, as ``head_000.nii.gz``; ``None`` writes no labels.
        complete: otherwise subject *i* lacks modality *i* modulo 4.

    Returns:
        the paths of the images.
    """
    paths = []
    for index in range(count):
        image, labels = head(np.random.default_rng((seed, index)), shape=shape, spacing_mm=spacing_mm)
        for number, (name, values) in enumerate(zip(MODALITIES, image, strict=True)):
            if complete or number != index % len(MODALITIES):
                paths.append(Path(folder, f"head_{index:03d}", f"{name}.nii.gz"))
                _write(paths[-1], values, spacing_mm)
        if labels_folder is not None:
            _write(Path(labels_folder, f"head_{index:03d}.nii.gz"), labels, spacing_mm)
    return paths


def phantom(
    rng: np.random.Generator,
    *,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    channels: int = 1,
    organs: Sequence[Organ] = ORGANS,
) -> tuple[np.ndarray, np.ndarray]:
    """One subject, another at each call.

    Args:
        rng: the only source of randomness.
        shape: voxels (z, y, x), at least 16 each so that the labelled structures have a core.
        spacing_mm: voxel size (z, y, x) in mm.
        channels: contrasts of the same anatomy, at most ``len(CONTRASTS)``.
        organs: what the body holds, later ones on top.

    Returns:
        the image (C, z, y, x) float32 in arbitrary units, about 0 to 2000, and the organs' labels (z, y, x) uint8.

    Raises:
        ValueError: for a smaller shape or more channels.
    """
    if min(shape) < 16:
        raise ValueError(f"a phantom needs at least 16 voxels along each axis, not {tuple(shape)}")
    if not 1 <= channels <= len(CONTRASTS):
        raise ValueError(f"a phantom has 1 to {len(CONTRASTS)} channels, not {channels}")
    tissue, labels = _anatomy(rng, shape, spacing_mm, organs)
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
    organs: Sequence[Organ] = ORGANS,
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
        organs: what each body holds.

    Returns:
        the paths of the images.
    """
    paths = []
    for index in range(count):
        image, labels = phantom(
            np.random.default_rng((seed, index)), shape=shape, spacing_mm=spacing_mm, channels=channels, organs=organs
        )
        for channel, values in enumerate(image):
            paths.append(Path(folder, f"phantom_{index:03d}_{channel:04d}.nii.gz"))
            _write(paths[-1], values, spacing_mm)
        if labels_folder is not None:
            _write(Path(labels_folder, f"phantom_{index:03d}.nii.gz"), labels, spacing_mm)
    return paths


def _anatomy(rng, shape, spacing_mm, organs):
    """Tissue and label of each voxel."""
    grid = _bent_grid(rng, shape, spacing_mm, size=np.array([1, *rng.uniform(0.80, 0.94, 2)]), bend=0.05)
    return _painted(rng, (BODY, *organs), grid)


def _bent_grid(rng, shape, spacing_mm, *, size, bend):
    """Place (3, *shape) of each voxel in a body of half axes 1: its size, and one smooth displacement."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) / size[:, None, None, None]
    return grid + np.stack([bend * _smooth_noise(rng, shape, spacing_mm, length=0.2) for _ in range(3)])


def _painted(rng, organs, grid, *, spread=1.0):
    """Tissue and label of each voxel, later organs on top."""
    tissue, labels = (np.zeros(grid.shape[1:], np.uint8) for _ in range(2))
    for organ in organs:
        where = _individual(rng, organ, grid, spread)
        tissue[where] = organ.tissue
        labels[where] = organ.label
    return tissue, labels


def _individual(rng, organ, grid, spread=1.0):
    """Where one subject's organ lies: moved, resized, leaning, bent and tapered at random, more or less."""
    centre = organ.centre + spread * rng.normal(0, 0.035, 3)
    radii = organ.radii * rng.uniform(1 - 0.16 * spread, 1 + 0.16 * spread, 3)
    lean, bend, taper = spread * rng.normal(0, 0.18, 3)
    z, y, x = (grid - centre[:, None, None, None]) / radii[:, None, None, None]
    y = y + lean * z + bend * (z * z - 0.3)
    x = x * (1 + taper * z)
    return x * x + y * y + z * z <= 1


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
