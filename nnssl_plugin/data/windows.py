"""Choosing windows inside a case and reading them, padded or resized."""

from collections.abc import Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch.nn import functional


def random_origin(
    case_shape: Sequence[int],
    window: Sequence[int],
    rng: np.random.Generator,
    anchor: Sequence[float | None] | None = None,
    *,
    placement: str = "inside",
) -> np.ndarray:
    """First voxel of a random window that stays inside the case and contains ``anchor``.

    Args:
        case_shape: spatial shape of the case, in voxels.
        window: spatial shape of the window.
        rng: source of the randomness.
        anchor: a coordinate per axis that the window must contain, ``None`` for any; clipped to the case.
        placement: along axes where the window is larger, the case lies in its middle (``inside``) or anywhere in it
            (``free``).
    """
    origin = np.empty(len(window), dtype=int)
    for axis, (size, wanted) in enumerate(zip(case_shape, window, strict=True)):
        low, high = 0, size - wanted
        if high <= 0:
            origin[axis] = rng.integers(high, 1) if placement == "free" else high // 2
            continue
        point = None if anchor is None else anchor[axis]
        if point is not None:
            voxel = int(np.clip(round(point), 0, size - 1))
            low, high = max(low, voxel - wanted + 1), min(high, voxel)
        origin[axis] = rng.integers(low, high + 1)
    return origin


def fitted_extent(case_shape: Sequence[int], window: Sequence[int], *, flat: bool) -> np.ndarray:
    """Size of the piece of a case that a window shows at the largest factor at which the case's plane fits into it.

    The plane is that of the last two axes, which have one factor, so that the piece has the window's proportions there
    (to a voxel of the case) and is larger than the case along one of them, unless both have the same proportions. Along
    the first axis it is all of the case, at a factor of its own (M3Ret, section 4.1: CT is resized to 64 slices).

    Args:
        case_shape: spatial shape of the case, in voxels.
        window: spatial shape of the window.
        flat: whether the window is a single slice, which is never averaged with others.

    Returns:
        (3,) whole numbers, in voxels of the case.
    """
    voxels = max(case_shape[axis] / window[axis] for axis in (1, 2))  # of the case, in one of the window
    in_plane = [max(case_shape[axis], round(window[axis] * voxels)) for axis in (1, 2)]
    return np.array([1 if flat else case_shape[0], *in_plane])


def covering_origins(shape: Sequence[int], window: Sequence[int], *, step: float = 1.0) -> np.ndarray:
    """First voxels (W, axes) of the windows that cover a box of this shape, as nnU-Net's sliding window has them.

    Along axes where the window is larger, the box lies in its middle.

    Args:
        shape: of the box, in voxels.
        window: size of a window.
        step: between two windows, over their size; they overlap more only where the box is no multiple of it.
    """
    # here: workers of a training import this module, and predict nothing
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    covered = [max(size, wanted) for size, wanted in zip(shape, window, strict=True)]
    centred = [-((whole - size) // 2) for whole, size in zip(covered, shape, strict=True)]
    starts = compute_steps_for_sliding_window(tuple(covered), tuple(window), step)
    return np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, len(window)) + centred


def random_place(size: int, rng: np.random.Generator) -> int:
    """A voxel in the middle half of an axis of ``size`` voxels, all equally likely."""
    return int(rng.integers(size // 4, size - size // 4))


def read_window(data, origin: Sequence[int], window: Sequence[int]) -> np.ndarray:
    """Read (C, *window) from a case (C, *spatial), array or blosc2 file; outside the case it is 0."""
    box = [[int(o), int(o + w)] for o, w in zip(origin, window, strict=True)]
    return np.asarray(crop_and_pad_nd(data, box, 0), dtype=np.float32)


def read_labels(segmentation, origin: Sequence[int], window: Sequence[int]) -> np.ndarray:
    """Read (*window) int16 from a segmentation (1, *spatial), array or blosc2 file; outside the case it is -1."""
    box = [[int(o), int(o + w)] for o, w in zip(origin, window, strict=True)]
    return np.asarray(crop_and_pad_nd(segmentation, box, -1), dtype=np.int16)[0]


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (C, *spatial) to (C, *size): axes that shrink are averaged (no aliasing), axes that grow interpolated."""
    x = torch.from_numpy(np.asarray(image, dtype=np.float32))[None]
    shrunk = [min(a, b) for a, b in zip(x.shape[2:], size, strict=True)]
    for target, mode in ((shrunk, "area"), (list(size), {2: "bilinear", 3: "trilinear"}[len(shrunk)])):
        if target != list(x.shape[2:]):  # to its own size both are the image itself
            x = functional.interpolate(x, size=target, mode=mode)
    return x[0].numpy()


def resize_labels(segmentation: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (1, *spatial) to (*size) int16: each voxel takes the label of the nearest one."""
    x = torch.from_numpy(np.asarray(segmentation, dtype=np.float32))[None]
    return functional.interpolate(x, size=tuple(size), mode="nearest-exact")[0, 0].numpy().astype(np.int16)
