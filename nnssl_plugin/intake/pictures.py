"""2D images (PNG, JPEG, BMP, TIFF): read strictly, made grey or RGB, and stored as PNG."""

import hashlib
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage

from nnssl_plugin.io.refusals import RejectedScan, check_memory, refusal
from nnssl_plugin.io.scans import check_openable

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
"""Pillow's names of the formats that are opened, whatever the file is named."""
SMALLEST = 8
"""Pixels along an edge; anything smaller is an icon."""
GREY_16 = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's names for 16 bits per pixel."""

_READ_ERRORS = (
    *(
        OSError,
        EOFError,
        ValueError,
        TypeError,
        SyntaxError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ),
    *(MemoryError, struct.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class Picture:
    """A 2D image: (H, W) or, in colour, (H, W, 3), uint8 or (grey) uint16."""

    array: np.ndarray
    as_stored: bool  # the file is a PNG of exactly these pixels
    lost_colour: bool  # the file has colour, and grey was asked for

    def pixels_sha256(self) -> str:
        """Hash of shape and values, the same for the same pixels in any container."""
        digest = hashlib.sha256(repr(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array, dtype="<u2").data)
        return digest.hexdigest()


def is_picture(path: Path) -> bool:
    """Whether a file is a 2D image by its name."""
    return path.name.lower().endswith(PICTURE_ENDINGS)


def load_picture(path: Path, *, colour: bool) -> Picture:
    """Read a 2D image and check it. Transparency is dropped, and a photograph turned as its EXIF data says.

    Args:
        path: the file.
        colour: three channels for every image; otherwise one, with colour made grey by its luminance (ITU-R 601-2).

    Raises:
        UnavailableScan: it cannot be opened, or there is too little memory.
        RejectedScan: the file is empty, truncated or unreadable, holds several images, floating-point pixels or
            fewer than :data:`SMALLEST` pixels along an edge, or is constant.
    """
    check_openable(path)
    try:
        if path.stat().st_size == 0:
            raise RejectedScan("empty file (0 bytes)")
        with Image.open(path, formats=FORMATS) as image:
            check_memory(image.width * image.height, bytes_per_voxel=4)
            if getattr(image, "n_frames", 1) > 1:
                raise RejectedScan(f"{image.n_frames} images in one file: one is needed")
            same = image.format == "PNG" and image.mode in (("RGB",) if colour else ("L", *GREY_16))
            same &= "transparency" not in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            image = ImageOps.exif_transpose(image)
            array = _pixels(image, colour=colour)
            lost = not colour and _has_colour(image)
    except _READ_ERRORS as error:
        raise refusal(error, "truncated, damaged or unreadable") from error
    if min(array.shape[:2]) < SMALLEST:
        raise RejectedScan(f"{array.shape[1]} x {array.shape[0]} pixels: at least {SMALLEST} along an edge are needed")
    if array.min() == array.max():
        raise RejectedScan(f"constant image: every pixel is {array.min()}")
    return Picture(array, as_stored=same, lost_colour=lost)


def picture_mask(array: np.ndarray) -> np.ndarray:
    """Foreground (H, W) uint8 of a picture's array, 1 inside: everything but its darkest pixels, holes filled.

    Otsu's threshold, which cuts volumes, would leave out what is dark and matters: a lesion in ultrasound, a lung in
    an X-ray.
    """
    grey = array if array.ndim == 2 else array.max(axis=-1)
    foreground = ndimage.binary_fill_holes(grey > grey.min())
    return (foreground if foreground.any() else np.ones(grey.shape)).astype(np.uint8)


def png_bytes(array: np.ndarray) -> bytes:
    """A PNG file of an array; the same array gives the same bytes."""
    stream = BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def _pixels(image: Image.Image, *, colour: bool) -> np.ndarray:
    if image.mode == "F":
        raise RejectedScan("floating-point pixels: store it as 16-bit grey")
    if image.mode in GREY_16 and not colour:
        array = np.asarray(image)
        if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
            raise RejectedScan("32-bit pixels: store it as 16-bit grey")
        return array.astype(np.uint16)
    if image.mode in GREY_16:
        raise RejectedScan("16-bit grey among colour images: store it with 8 bits")
    if image.mode in ("1", "L", "LA") and not colour:
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB") if colour else image.convert("RGB").convert("L"))


def _has_colour(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "LA", *GREY_16):
        return False
    channels = np.asarray(image.convert("RGB"))
    return bool((channels != channels[..., :1]).any())
