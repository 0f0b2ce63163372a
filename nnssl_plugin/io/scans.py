"""Reading one scan file strictly: what a lenient reader would let through is refused here, with a reason."""

import errno
import gzip
import hashlib
import math
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.io.memory import available_memory

NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
ENDINGS = NIFTI_ENDINGS + ITK_ENDINGS

SHEAR_TOLERANCE = 1e-2
"""Largest cosine between two voxel axes that still counts as a right angle (about half a degree)."""
SPACING_TOLERANCE = 1e-2
"""Largest relative difference between the voxel size of the header and that of the affine."""

NIFTI_UNIT_MM = {1: 1e3, 2: 1.0, 3: 1e-3}
"""Code of a NIfTI header's unit of length (metre, mm, micron) → mm; 0 and what is not known counts as mm."""
ITK_UNIT_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3}
"""The same for the texts of NRRD ("space units") and MetaImage ("DistanceUnits"); other texts are refused."""
VOXEL_MM = (1e-4, 100.0)
"""Sizes between which a voxel's edge is believed where the header states another unit than mm."""

READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    MemoryError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
)
"""What readers raise for files that are not what they claim to be."""
BYTES_PER_VOXEL = 12
"""Memory that checking a scan and making its mask takes per voxel, beside the voxels as stored."""
MOST_TRAILING_BYTES = 1 << 24
"""Bytes after the last voxel that are tolerated where the voxels are fewer; up to as many as these otherwise."""
MOST_GZIP_RATIO = 1032
"""Bytes that one byte of DEFLATE (RFC 1951) can hold at most."""

_HEADER_BYTES = 65536  # more than the text header of any NRRD or MetaImage file in use
_ITK_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_DATA_FILE = re.compile(r"^\s*(?:ElementDataFile\s*[=:]|data ?file\s*:)[ \t]*(.*?)\s*$", re.MULTILINE | re.IGNORECASE)
_METAIMAGE_HEADER = re.compile(r".*?^\s*ElementDataFile\s*[=:][^\n]*", re.MULTILINE | re.DOTALL)
_NRRD_HEADER = re.compile(r".*?\r?\n\r?\n", re.DOTALL)
_OUTSIDE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV,
    errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ELOOP,
}  # fmt: skip
"""Errors of the system that say nothing about the file itself."""


class RejectedScan(Exception):
    """A file that cannot become a case; the message says why, in one line."""


class UnavailableScan(RejectedScan):
    """A file that cannot become a case now, for a cause outside of it: permissions, a failing disk, too little memory.
    Trying again later makes sense."""


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
        image, unit = _read_nifti(path, frames) if ending_of(path) in NIFTI_ENDINGS else _read_itk(path)
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
            image, _ = _read_itk(path)
            affine = image.affine
        if image.ndim != 3:
            raise RejectedScan(f"{image.ndim}D image: a 3D volume is needed")
        return image.get_fdata(dtype=np.float32, caching="unchanged"), affine
    except READ_ERRORS as error:
        raise refusal(error, "unreadable") from error


def file_parts(path: Path) -> list[Path]:
    """The files that hold a scan: the file itself, and the data file that a detached header (.mhd, .nhdr) names, where
    it is one in the header's folder."""
    if ending_of(path) not in (".mhd", ".nhdr") or not path.is_file():
        return [path]
    named = _DATA_FILE.search(_text_header(path))
    data = path.parent / named[1] if named and named[1] else path
    return [path, data] if data.is_file() and data != path and _is_beside(data, path) else [path]


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
        raise UnavailableScan(f"cannot be opened: {_one_line(error)}") from error


def check_memory(voxels: int, bytes_per_voxel: int) -> None:
    """Look whether an image of a header's size fits into the memory that is free, before any of it is read.

    Raises:
        UnavailableScan: it does not.
    """
    needed, free = voxels * (bytes_per_voxel + BYTES_PER_VOXEL), available_memory()
    if free is not None and needed > free:
        raise UnavailableScan(
            f"too large for the memory: {voxels} voxels need about {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB "
            "are free"
        )


def refusal(error: Exception, what: str) -> RejectedScan:
    """``error`` of reading a file as a refusal, by its cause: the file, or something outside of it."""
    outside = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OUTSIDE_ERRORS)
    return (
        UnavailableScan(f"cannot be read now: {_one_line(error)}")
        if outside
        else RejectedScan(f"{what}: {_one_line(error)}")
    )


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
    _check_spacing(header["pixdim"][1:4].tolist()[: header["dim"][0]])
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
            f"its header states a unit of length of {unit:g} mm, which makes voxels of {_mm(sizes)}: correct its unit"
        )


def _itk_unit_mm(header: str) -> float:
    stated = re.findall(r"^(?:DistanceUnits\s*=|space units:)\s*(\S.*?)\s*$", header, re.MULTILINE | re.IGNORECASE)
    units = {text.lower() for text in re.split(r"[\s\"]+", " ".join(stated)) if text} - {"none", "?"}
    if len(units) > 1 or not units <= set(ITK_UNIT_MM):
        raise RejectedScan(f"unit of length {', '.join(sorted(units))}: convert it to mm")
    return ITK_UNIT_MM[units.pop()] if units else 1.0


def _read_itk(path: Path) -> tuple[nibabel.Nifti1Image, float]:
    """The image in mm, and the unit of the file in mm."""
    import SimpleITK

    text = _text_header(path)
    _check_data_file(text, path)
    # ITK turns a negative spacing into a flipped axis without a word
    stated = re.search(r"^(?:ElementSpacing\s*=|spacings:)([-+0-9.eE \t]+)$", text, re.MULTILINE)
    if stated:
        _check_spacing([float(number) for number in stated.group(1).split()])
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(_ITK_READERS[ending_of(path)])
    reader.SetFileName(_utf8(path))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise RejectedScan(f"{reader.GetNumberOfComponents()} values per voxel: one is needed")
    if reader.GetDimension() != 3:
        raise RejectedScan(f"{reader.GetDimension()}D image: a 3D volume is needed")
    check_memory(math.prod(reader.GetSize()), SimpleITK.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent())
    volume = reader.Execute()
    unit = _itk_unit_mm(text)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(volume.GetDirection(), (3, 3)) * np.asarray(volume.GetSpacing())
    affine[:3, 3] = volume.GetOrigin()
    affine[:3] *= unit
    array = SimpleITK.GetArrayFromImage(volume).T
    return nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, dtype=array.dtype), unit


def _text_header(path: Path) -> str:
    """The text at the start of a NRRD or MetaImage file, as Latin-1."""
    with path.open("rb") as stream:
        return stream.read(_HEADER_BYTES).decode("latin-1")


def _check_data_file(text: str, path: Path) -> None:
    """ITK opens whatever a header names: let it name the file itself, or one other in the header's folder."""
    metaimage = ending_of(path) in (".mha", ".mhd")
    header = (_METAIMAGE_HEADER if metaimage else _NRRD_HEADER).match(text)
    if header is None and len(text) == _HEADER_BYTES:
        raise RejectedScan(f"unreadable: its header does not end within {_HEADER_BYTES} bytes")
    named = [match[1] for match in _DATA_FILE.finditer(header[0] if header else text)]
    if ending_of(path) in (".mha", ".nrrd") and named in ([], ["LOCAL"]):
        return
    if len(named) != 1:
        raise RejectedScan("unreadable: its header does not name one data file")
    data = path.parent / named[0]
    if not _is_beside(data, path):
        raise RejectedScan(f"its header names a data file outside its own folder: {named[0]}")
    if not data.is_file():
        raise RejectedScan(f"unreadable: its data file {named[0]} is not there")


def _is_beside(data: Path, header: Path) -> bool:
    """Whether a data file lies in the folder of its header, links followed, where both may be links to one folder."""
    folders = (header.parent.resolve(), header.resolve().parent)
    return any(data.resolve().is_relative_to(folder) for folder in folders)


def _utf8(path: Path) -> str:
    try:
        return path.as_posix().encode("utf-8").decode()
    except UnicodeEncodeError as error:
        raise RejectedScan("its path is not UTF-8, and ITK cannot open it: rename it") from error


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
        raise RejectedScan(f"contradicting header: spacing {_mm(zooms)}, but {_mm(sizes)} by its affine")


def _check_spacing(spacing: list[float]) -> None:
    if any(not math.isfinite(size) or size <= 0 for size in spacing):
        raise RejectedScan(f"spacing of zero or less: {_mm(spacing)}")


def _mm(spacing) -> str:
    return " x ".join(f"{size:.4g}" for size in spacing) + " mm"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:160]}" if lines else type(error).__name__
