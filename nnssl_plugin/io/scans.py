"""Reading one scan file strictly: what a lenient reader would let through is refused here, with a reason."""

import gzip
import hashlib
import math
import stat
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.io.itk_files import ITK_ENDINGS, file_parts, read_itk
from nnssl_plugin.io.refusals import (
    READ_ERRORS,
    RejectedScan,
    UnavailableScan,
    check_memory,
    check_spacing,
    in_mm,
    one_line,
    refusal,
)

NIFTI_ENDINGS = (".nii.gz", ".nii")
ENDINGS = NIFTI_ENDINGS + ITK_ENDINGS

SHEAR_TOLERANCE = 1e-2
"""Largest cosine between two voxel axes that still counts as a right angle (about half a degree)."""
SPACING_TOLERANCE = 1e-2
"""Largest relative difference between the voxel size of the header and that of the affine."""

NIFTI_UNIT_MM = {1: 1e3, 2: 1.0, 3: 1e-3}
"""Code of a NIfTI header's unit of length (metre, mm, micron) → mm; 0 and what is not known counts as mm."""
VOXEL_MM = (1e-4, 100.0)
"""Sizes between which a voxel's edge is believed where the header states another unit than mm."""

MOST_TRAILING_BYTES = 1 << 24
"""Bytes after the last voxel that are tolerated where the voxels are fewer; up to as many as these otherwise."""
MOST_GZIP_RATIO = 1032
"""Bytes that one byte of DEFLATE (RFC 1951) can hold at most."""


@dataclass(frozen=True)
class Scan:
    """A volume as stored: array (I, J, K) float32 in nibabel's axis order, and a NIfTI image with its geometry."""

    array: np.ndarray
    image: nibabel.Nifti1Image
    in_mm: bool = True
    """Whether the file itself is in mm; ``image`` always is."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along the stored axes in mm."""
        return tuple(float(size) for size in nibabel.affines.voxel_sizes(self.image.affine))

    @property
    def orientation(self) -> str:
        """Where the stored axes point, for example ``LPS``."""
        return "".join(nibabel.aff2axcodes(self.image.affine))

    def voxels_sha256(self) -> str:
        """Hash of shape and values, the same for the same voxels in any container."""
        digest = hashlib.sha256(repr(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array.T, dtype="<f4").data)
        return digest.hexdigest()


def ending_of(path: Path) -> str | None:
    """The container's file ending in lower case, or None where the file is no scan by its name."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def load_scan(path: Path) -> Scan:
    """Read a volume of any supported container and check it.

    The header decides, before a voxel is read, whether the memory suffices; a detached header may name no data file
    outside its own folder; what is no regular file (a FIFO, a device) is not opened.

    Raises:
        RejectedScan: the file is empty, truncated or unreadable, not one 3D volume of one value per voxel, has no
            usable geometry, is constant, or holds NaN or infinity.
        UnavailableScan: it cannot be opened, or there is too little memory.
    """
    return _load(path, 0)[0]


def load_frames(path: Path, frames: int) -> tuple[Scan, ...]:
    """The volumes of a 4D NIfTI file, each checked like a scan of its own.

    Args:
        path: the file.
        frames: how many volumes it has to hold.

    Raises:
        RejectedScan, UnavailableScan: as of :func:`load_scan`; or it holds another number of volumes.
    """
    return _load(path, frames)


def _load(path: Path, frames: int) -> tuple[Scan, ...]:
    """The one volume of a file (``frames`` 0), or the volumes of a 4D file."""
    check_openable(path)
    try:
        if all(part.stat().st_size == 0 for part in file_parts(path)):
            raise RejectedScan("empty file (0 bytes)")
        image, unit = _read_nifti(path, frames) if ending_of(path) in NIFTI_ENDINGS else read_itk(path)
        images = nibabel.four_to_three(image) if frames else [image]
        for volume in images:
            _check_grid(volume)
        if unit != 1:
            _check_converted(image, unit)
        arrays = [volume.get_fdata(dtype=np.float32, caching="unchanged") for volume in images]
    except READ_ERRORS as error:
        raise refusal(error, "truncated, damaged or unreadable") from error
    for array in arrays:
        if not np.isfinite(array).all():
            raise RejectedScan(f"{int((~np.isfinite(array)).sum())} voxels are NaN or infinite")
        if array.min() == array.max():
            raise RejectedScan(f"constant image: every voxel is {array.min():g}")
    return tuple(Scan(array=array, image=volume, in_mm=unit == 1) for array, volume in zip(arrays, images, strict=True))


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The array (I, J, K) float32 as stored and its (4, 4) affine in RAS mm, without the checks of :func:`load_scan`.

    Raises:
        RejectedScan: the file is no readable 3D volume with geometry.
    """
    check_openable(path)
    try:
        if ending_of(path) in NIFTI_ENDINGS:
            image = nibabel.load(path)
            check_memory(math.prod(image.shape), image.get_data_dtype().itemsize)
            affine = np.diag([*[nifti_unit_mm(image.header)] * 3, 1.0]) @ image.affine
        else:
            image, _ = read_itk(path)
            affine = image.affine
        if image.ndim != 3:
            raise RejectedScan(f"{image.ndim}D image: a 3D volume is needed")
        return image.get_fdata(dtype=np.float32, caching="unchanged"), affine
    except READ_ERRORS as error:
        raise refusal(error, "unreadable") from error


def check_openable(path: Path) -> None:
    """Look whether the files that hold a scan are regular files, and open each once.

    Raises:
        RejectedScan: a FIFO, device, socket or folder; it is not opened.
        UnavailableScan: the system refuses to open or read it.
    """
    try:
        for part in (path, *file_parts(path)[1:]):
            if not stat.S_ISREG(part.stat().st_mode):
                raise RejectedScan("no regular file but a FIFO, device, socket or folder: it is not opened")
            with part.open("rb") as stream:
                stream.read(1)
    except OSError as error:
        raise UnavailableScan(f"cannot be opened: {one_line(error)}") from error


def nifti_unit_mm(header: nibabel.Nifti1Header) -> float:
    """Length of the unit that a NIfTI header states, in mm; nibabel and nnU-Net's readers of it take it for mm."""
    return NIFTI_UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)


def stored_bytes(image: nibabel.Nifti1Image) -> bytes:
    """A gzipped NIfTI file of the image; the same image gives the same bytes.

    Its header holds geometry, voxel type and scaling, and nothing else of the image's header: that may name people.
    """
    return gzip.compress(_without_texts(image).to_bytes(), compresslevel=4, mtime=0)


def _without_texts(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """The image without the texts and extensions of its header."""
    header, old = type(image.header)(endianness=image.header.endianness), image.header
    for name in (
        "dim", "datatype", "bitpix", "pixdim", "xyzt_units", "scl_slope", "scl_inter", "qform_code", "sform_code",
        "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
    ):  # fmt: skip
        header[name] = old[name]
    return type(image)(image.dataobj, None, header)  # no affine: it would be written anew


def _read_nifti(path: Path, frames: int = 0) -> tuple[nibabel.Nifti1Image, float]:
    """The image in mm, and the unit of the file in mm.

    nibabel stops at the last voxel and repairs a spacing of zero to one: the stream is read to its checksum here,
    and the header is looked at before nibabel mends it."""
    compressed = ending_of(path) == ".nii.gz"
    with gzip.open(path) if compressed else path.open("rb") as stream:
        kind, header, expected = _nifti_header(stream.read(nibabel.Nifti2Header.sizeof_hdr))
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        size = path.stat().st_size * (MOST_GZIP_RATIO if compressed else 1)
        if size < expected:
            raise RejectedScan(f"truncated: the header promises {expected} bytes, the file holds at most {size}")
        if frames and (len(shape) != 4 or shape[3] != frames):
            raise RejectedScan(f"image {tuple(shape)}: {frames} volumes in one file are needed")
        _check_shape(shape[:3] if frames else shape, dtype)
        check_memory(math.prod(shape), dtype.itemsize)
        stream.seek(0)
        content = stream.read(expected)
        trailing = 0
        while block := stream.read(1 << 20):  # to the checksum
            trailing += len(block)
            if trailing > max(expected, MOST_TRAILING_BYTES):
                raise RejectedScan(f"more than {trailing} bytes after the {expected} that the header promises")
    if len(content) < expected:
        raise RejectedScan(f"truncated: the header promises {expected} bytes, the file holds {len(content)}")
    unit = nifti_unit_mm(header)
    if unit != 1:
        content = _in_millimetres(header, unit).binaryblock + content[len(header.binaryblock) :]
    return kind.from_bytes(content), unit


def _nifti_header(start: bytes) -> tuple[type[nibabel.Nifti1Image], nibabel.Nifti1Header, int]:
    """Class, header as stored and promised size in bytes of the NIfTI file that begins with ``start``."""
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        size = kind.header_class.sizeof_hdr
        if len(start) >= size and size in (int.from_bytes(start[:4], order) for order in ("little", "big")):
            break
    else:
        raise RejectedScan("unreadable header: not a NIfTI file")
    header = kind.header_class.from_fileobj(BytesIO(start), check=False)
    if not 1 <= header["dim"][0] <= 7 or (header["dim"][1 : header["dim"][0] + 1] < 0).any():
        raise RejectedScan(f"unreadable header: dimensions {header['dim'].tolist()}")
    check_spacing(header["pixdim"][1:4].tolist()[: header["dim"][0]])
    try:
        dtype = header.get_data_dtype()
    except LookupError as error:
        raise RejectedScan(f"unreadable header: unknown datatype {int(header['datatype'])}") from error
    offset = max(int(header["vox_offset"]), size + 4)  # nibabel mends a smaller one to this
    return kind, header, offset + math.prod(header.get_data_shape()) * dtype.itemsize


def _in_millimetres(header: nibabel.Nifti1Header, unit: float) -> nibabel.Nifti1Header:
    """A header with every length times ``unit``; the voxels and their scaling stay as they are."""
    header = header.copy()
    header["pixdim"][1:4] *= unit
    for name in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
        header[name] = header[name] * unit
    header["xyzt_units"] = (int(header["xyzt_units"]) & ~7) | 2
    return header


def _check_converted(image: nibabel.Nifti1Image, unit: float) -> None:
    sizes = nibabel.affines.voxel_sizes(image.affine)
    if (sizes < VOXEL_MM[0]).any() or (sizes > VOXEL_MM[1]).any():
        raise RejectedScan(
            f"its header states a unit of length of {unit:g} mm, which makes voxels of {in_mm(sizes)}: correct its unit"
        )


def _check_shape(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 3:
        raise RejectedScan(f"{len(shape)}D image {tuple(shape)}: a 3D volume is needed")
    if min(shape) == 0:
        raise RejectedScan(f"empty image: shape {tuple(shape)}")
    if min(shape) == 1:
        raise RejectedScan(f"a single slice: shape {tuple(shape)}, a 3D volume is needed")
    if dtype.kind not in "iufb":
        raise RejectedScan(f"colour or complex voxels ({dtype}): one number per voxel is needed")


def _check_grid(image: nibabel.Nifti1Image) -> None:
    _check_shape(image.shape, image.get_data_dtype())
    axes = image.affine[:3, :3]
    sizes = np.linalg.norm(axes, axis=0)
    if not np.isfinite(image.affine).all() or (sizes <= 0).any():
        raise RejectedScan("singular affine: the position of the voxels is not defined")
    cosines = (axes / sizes).T @ (axes / sizes)
    if abs(np.linalg.det(axes / sizes)) < 1e-3:
        raise RejectedScan("singular affine: the position of the voxels is not defined")
    if np.abs(cosines - np.eye(3)).max() > SHEAR_TOLERANCE:
        raise RejectedScan("sheared affine (gantry tilt?): the voxel axes are not at right angles, resample it first")
    zooms = np.asarray(image.header.get_zooms()[:3])
    if not np.allclose(zooms, sizes, rtol=SPACING_TOLERANCE):
        raise RejectedScan(f"contradicting header: spacing {in_mm(zooms)}, but {in_mm(sizes)} by its affine")
