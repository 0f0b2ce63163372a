"""Which windows of an image make which row of an index: the whole image fitted, windows that cover it, lesions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from nnssl_plugin.data.images import Image, UnusableCase
from nnssl_plugin.data.windows import covering_origins, read_window, resize
from nnssl_plugin.features.preprocessing import Preprocessing
from nnssl_plugin.intake.body_mask import body_mask
from nnssl_plugin.nnunet.geometry import affine_of
from nnssl_plugin.nnunet.planes import stored_axis

CASE, WINDOW, LESION = ROWS = ("case", "window", "lesion")
"""What a row of an index stands for."""
WINDOWS, WHOLE = VIEWS = ("windows", "whole")
"""How an encoder sees an image: in windows at the plan's spacing, or whole, fitted into one window."""
LEAST_INSIDE = 0.1
"""Share of a window that lies in the body, for a row of its own."""


@dataclass(frozen=True)
class Row:
    """What becomes one vector."""

    part: str
    """Empty for a whole case, else ``window_003`` or ``lesion_01``."""
    places: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """First voxel and extent (z, y, x) of each of its windows."""
    regions: np.ndarray
    """(1, z, y, x) whole numbers over the preprocessed image, shared by the rows of a case."""
    region: int = 1
    """The number of the voxels that count."""
    facts: dict[str, str] = field(default_factory=dict)
    """Cells of the table."""


@dataclass(frozen=True)
class Prepared:
    """An image ready for the encoder."""

    case: str
    data: np.ndarray
    """(C, z, y, x) float32, preprocessed."""
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()


def prepare_case(
    case: str,
    files: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    rows: str = CASE,
    view: str = WINDOWS,
    segmentation: Path | None = None,
) -> Prepared:
    """Read, check and preprocess a case, and choose its windows.

    Args:
        case: its name.
        files: one per channel.
        preprocessing: of the encoder; it also gives the size of a window.
        rows: one of :data:`ROWS`.
        view: one of :data:`VIEWS`, for rows that stand for a case.
        segmentation: labels, for lesions.

    Raises:
        UnusableCase: as ``read_image`` does, and where a case has no lesion.
    """
    image = preprocessing.read(files, segmentation)
    window = (1,) * (3 - len(preprocessing.patch_size)) + preprocessing.patch_size
    made = [
        replace(row, facts=row.facts | {"height": _height(image, row, preprocessing.transpose_forward)})
        for row in _rows(image, window, rows, view)
    ]
    if not made:
        raise UnusableCase("its segmentation holds no lesion (no voxel above 0)")
    return Prepared(case, np.asarray(image.data, dtype=np.float32), tuple(made), image.warnings)


def cut(prepared: Prepared, row: Row, number: int, patch: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A window of a row (C, *patch) float32, 0 outside the image, and what counts in it (1, *patch)."""
    origin, extent = row.places[number]
    window = (1,) * (3 - len(patch)) + tuple(patch)
    pieces = read_window(prepared.data, origin, extent), _inside(row, origin, extent)
    data, inside = (piece if extent == window else resize(piece, window) for piece in pieces)
    return data.reshape(len(data), *patch), inside.reshape(1, *patch)


def _rows(image: Image, window: tuple[int, ...], rows: str, view: str) -> Iterator[Row]:
    if rows == LESION:
        yield from _lesions(image, window)
        return
    shape = image.data.shape[1:]
    if rows == CASE and view == WHOLE:
        yield Row("", (_fitted(shape, window),), np.ones((1, *shape), dtype=np.uint8))
        return
    body = _body(image.data)
    origins = covering_origins(shape, window)
    shares = np.array([read_window(body, origin, window).mean() for origin in origins])
    if rows == CASE:
        kept = origins[shares > 0]
        yield Row("", tuple((_place(origin), window) for origin in kept), body)
        return
    kept = origins[shares >= LEAST_INSIDE] if (shares >= LEAST_INSIDE).any() else origins[[shares.argmax()]]
    for number, origin in enumerate(kept):
        yield Row(f"window_{number:03d}", ((_place(origin), window),), body)


def _lesions(image: Image, window: tuple[int, ...]) -> Iterator[Row]:
    """Connected components of each label above 0 (faces touch), by label, then by place."""
    labels = np.asarray(image.segmentation)[0]
    found: list[tuple[int, tuple[slice, ...]]] = []
    lesions = np.zeros(labels.shape, dtype=np.int32)
    for label in np.unique(labels[labels > 0]):
        components, _ = ndimage.label(labels == label)
        lesions = np.where(components > 0, components + len(found), lesions)
        found += [(int(label), box) for box in ndimage.find_objects(components)]
    voxel = float(np.prod(image.spacing)) / 1000
    for number, (label, box) in enumerate(found, start=1):
        corner = np.array([axis.start for axis in box])
        origins = covering_origins([axis.stop - axis.start for axis in box], window) + corner
        volume = np.count_nonzero(lesions[box] == number) * voxel
        row = Row(
            f"lesion_{number:02d}", (), lesions[None], number, {"label": str(label), "volume_ml": f"{volume:.4g}"}
        )
        yield replace(row, places=tuple((_place(o), window) for o in origins if _inside(row, o, window).any()))


def _inside(row: Row, origin: Sequence[int], extent: Sequence[int]) -> np.ndarray:
    """(1, *extent) float32: 1 where a voxel of a window counts."""
    return (read_window(row.regions, origin, extent) == row.region).astype(np.float32)


def _body(data: np.ndarray) -> np.ndarray:
    """(1, z, y, x) uint8: the body in the first channel that is not constant; air is dark after any normalisation."""
    channel = next((each for each in data if each.min() < each.max()), data[0])
    if channel.min() == channel.max():
        return np.ones((1, *channel.shape), dtype=np.uint8)
    return np.ascontiguousarray(body_mask(channel.T, np.eye(4), modality="").T)[None]


def _fitted(shape: Sequence[int], window: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The piece that shows the whole image, all axes at one factor, the image in its middle; of a volume in 2D its
    middle slice."""
    flat = window[0] == 1
    axes = (1, 2) if flat else (0, 1, 2)
    voxels = max(shape[axis] / window[axis] for axis in axes)  # of the image, in one of the window
    extent = [max(shape[axis], round(window[axis] * voxels)) for axis in range(3)]
    origin = [-((whole - size) // 2) for whole, size in zip(extent, shape, strict=True)]
    if flat:
        extent[0], origin[0] = 1, shape[0] // 2
    return tuple(origin), tuple(extent)


def _place(origin: np.ndarray) -> tuple[int, ...]:
    return tuple(int(each) for each in origin)


def _height(image: Image, row: Row, transpose_forward: Sequence[int]) -> str:
    """Where the middle of what counts lies between the lowest (0) and the highest (1) axial slice of the image's file;
    empty for pictures."""
    affine, shape = affine_of(image.properties), image.data.shape[1:]
    low = np.maximum(0, np.min([origin for origin, _ in row.places], axis=0))
    high = np.minimum(shape, np.max([np.add(*place) for place in row.places], axis=0))
    inside = row.regions[0][tuple(map(slice, low, high))] == row.region
    if affine is None or 1 in shape or not inside.any():
        return ""
    box, whole = image.properties["bbox_used_for_cropping"], image.properties["shape_before_cropping"]
    of_reader = {}
    for axis, reader_axis in enumerate(transpose_forward):
        profile = inside.sum(axis=tuple(other for other in range(3) if other != axis))
        middle = np.average(low[axis] + np.arange(len(profile)) + 0.5, weights=profile) / shape[axis]
        first, end = box[axis]
        of_reader[reader_axis] = (first + middle * (end - first)) / whole[axis]
    axis, downwards = stored_axis(affine, "axial")
    height = of_reader[2 - axis]  # the reader's axes are (z, y, x), the matrix's (x, y, z)
    return f"{1 - height if downwards else height:.4f}"
