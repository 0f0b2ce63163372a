"""One picture of a dataset: the central slice of many cases with the outline of the mask, to find the wrong ones."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from PIL import Image, ImageDraw
from scipy import ndimage

from nnssl_plugin.io.files import atomic_path

SHEET_FILE = "contact_sheet.png"
EDGE = 128
"""Pixels along the edges of a thumbnail."""
COLUMNS, MOST = 10, 100
CAPTION = 14
"""Pixels below a thumbnail for the name of its case."""
OUTLINE = (230, 159, 0)
WINDOW = (1, 99)
"""Percentiles of the slice that become black and white."""


def volume_thumbnail(array: np.ndarray, mask: np.ndarray, affine: np.ndarray, *, height: float = 0.5) -> Image.Image:
    """An axial slice of (I, J, K) in its true proportions, the patient's right on the left, front at the top.

    Args:
        array: the image.
        mask: of the same shape; its outline is drawn.
        affine: (4, 4) to RAS mm.
        height: of the slice, from 0 (lowest) to 1.
    """
    orientation = nibabel.io_orientation(affine)
    sizes = np.empty(3)
    sizes[orientation[:, 0].astype(int)] = voxel_sizes(affine)
    slices = array.shape[int(np.flatnonzero(orientation[:, 0] == 2)[0])]
    chosen = min(int(height * slices), slices - 1)
    planes = [nibabel.apply_orientation(a, orientation)[::-1, ::-1, chosen].T for a in (array, mask)]
    return thumbnail(*planes, spacing=(sizes[1], sizes[0]))


def thumbnail(plane: np.ndarray, mask: np.ndarray, *, spacing: Sequence[float] = (1.0, 1.0)) -> Image.Image:
    """An image (H, W) or (H, W, 3) with the outline of its mask (H, W), on a black square of :data:`EDGE` pixels."""
    extent = np.array(plane.shape[:2]) * spacing
    height, width = np.maximum(1, np.rint(EDGE * extent / extent.max()).astype(int))
    grey = _windowed(plane if plane.ndim == 2 else plane.max(axis=-1))
    image = Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR).convert("RGB")
    inside = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)) > 0
    pixels = np.array(image)
    pixels[inside & ~ndimage.binary_erosion(inside)] = OUTLINE
    square = Image.new("RGB", (EDGE, EDGE))
    square.paste(Image.fromarray(pixels), ((EDGE - width) // 2, (EDGE - height) // 2))
    return square


def write_contact_sheet(path: Path, thumbnails: Sequence[tuple[str, Path]]) -> None:
    """Write the first :data:`MOST` thumbnails (case, PNG file), with the names of their cases, as one PNG."""
    shown = thumbnails[:MOST]
    rows = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    sheet = Image.new("RGB", (columns * EDGE, rows * (EDGE + CAPTION)))
    draw = ImageDraw.Draw(sheet)
    for number, (case, file) in enumerate(shown):
        x, y = number % COLUMNS * EDGE, number // COLUMNS * (EDGE + CAPTION)
        with Image.open(file, formats=("PNG",)) as image:
            sheet.paste(image, (x, y))
        draw.text((x + 2, y + EDGE), case[-20:], fill=(255, 255, 255))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _windowed(plane: np.ndarray) -> np.ndarray:
    low, high = np.percentile(plane, WINDOW)
    scale = (plane - low) / (high - low) if high > low else plane - plane.min()
    return (np.clip(scale, 0, 1) * 255).astype(np.uint8)
