"""Reading one scan file strictly: what a lenient reader would let through is refused here, with a reason."""

import gzip
import hashlib
import math
import re
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np

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

_READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    OverflowError,
    MemoryError,
    RuntimeError,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
)
_HEADER_BYTES = 65536  # more than the text header of any NRRD or MetaImage file in use


class RejectedScan(Exception):
    """A file that cannot become a case; the message says why, in one line."""


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

    Raises:
        RejectedScan: the file is empty, truncated or unreadable, not one 3D volume of one value per voxel, has no
            usable geometry, is constant, or holds NaN or infinity.
    """
    try:
        if all(part.stat().st_size == 0 for part in file_parts(path)):
            raise RejectedScan("empty file (0 bytes)")
        image, unit = _read_nifti(path) if ending_of(path) in NIFTI_ENDINGS else _read_itk(path)
        _check_grid(image)
        if unit != 1:
            _check_converted(image, unit)
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except _READ_ERRORS as error:
        raise RejectedScan(f"truncated, damaged or unreadable: {_one_line(error)}") from error
    if not np.isfinite(array).all():
        raise RejectedScan(f"{int((~np.isfinite(array)).sum())} voxels are NaN or infinite")
    if array.min() == array.max():
        raise RejectedScan(f"constant image: every voxel is {array.min():g}")
    return Scan(array=array, image=image, in_mm=unit == 1)


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The array (I, J, K) float32 as stored and its (4, 4) affine in RAS mm, without the checks of :func:`load_scan`.

    Raises:
        RejectedScan: the file is no readable 3D volume with geometry.
    """
    try:
        if ending_of(path) in NIFTI_ENDINGS:
            image = nibabel.load(path)
            affine = np.diag([*[nifti_unit_mm(image.header)] * 3, 1.0]) @ image.affine
        else:
            image, _ = _read_itk(path)
            affine = image.affine
        if image.ndim != 3:
            raise RejectedScan(f"{image.ndim}D image: a 3D volume is needed")
        return image.get_fdata(dtype=np.float32, caching="unchanged"), affine
    except _READ_ERRORS as error:
        raise RejectedScan(f"unreadable: {_one_line(error)}") from error


def file_parts(path: Path) -> list[Path]:
    """The files that hold a scan: the file itself, and the data file that a detached header (.mhd, .nhdr) names."""
    if ending_of(path) not in (".mhd", ".nhdr"):
        return [path]
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES).decode("latin-1")
    named = re.search(r"^(?:ElementDataFile\s*=|data ?file:)\s*(\S.*?)\s*$", header, re.MULTILINE | re.IGNORECASE)
    data = path.parent / named.group(1) if named else path
    return [path, data] if data.is_file() and data != path else [path]


def nifti_unit_mm(header: nibabel.Nifti1Header) -> float:
    """Length of the unit that a NIfTI header states, in mm; nibabel and nnU-Net's readers of it take it for mm."""
    return NIFTI_UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)


def stored_bytes(image: nibabel.Nifti1Image) -> bytes:
    """A gzipped NIfTI file of the image; the same image gives the same bytes."""
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def _read_nifti(path: Path) -> tuple[nibabel.Nifti1Image, float]:
    """The image in mm, and the unit of the file in mm.

    nibabel stops at the last voxel and repairs a spacing of zero to one: the stream is read to its checksum here,
    and the header is looked at before nibabel mends it."""
    content = path.read_bytes()
    if ending_of(path) == ".nii.gz":
        content = gzip.decompress(content)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        size = kind.header_class.sizeof_hdr
        if len(content) >= size and size in (int.from_bytes(content[:4], order) for order in ("little", "big")):
            break
    else:
        raise RejectedScan("unreadable header: not a NIfTI file")
    header = kind.header_class.from_fileobj(BytesIO(content), check=False)
    if not 1 <= header["dim"][0] <= 7 or (header["dim"][1 : header["dim"][0] + 1] < 0).any():
        raise RejectedScan(f"unreadable header: dimensions {header['dim'].tolist()}")
    _check_spacing(header["pixdim"][1:4].tolist()[: header["dim"][0]])
    expected = int(header["vox_offset"]) + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if len(content) < expected:
        raise RejectedScan(f"truncated: the header promises {expected} bytes, the file holds {len(content)}")
    unit = nifti_unit_mm(header)
    if unit != 1:
        content = _in_millimetres(header, unit).binaryblock + content[len(header.binaryblock) :]
    return kind.from_bytes(content), unit


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

    with path.open("rb") as stream:
        text = stream.read(_HEADER_BYTES).decode("latin-1")
    # ITK turns a negative spacing into a flipped axis without a word
    stated = re.search(r"^(?:ElementSpacing\s*=|spacings:)([-+0-9.eE \t]+)$", text, re.MULTILINE)
    if stated:
        _check_spacing([float(number) for number in stated.group(1).split()])
    volume = SimpleITK.ReadImage(str(path))
    if volume.GetNumberOfComponentsPerPixel() != 1:
        raise RejectedScan(f"{volume.GetNumberOfComponentsPerPixel()} values per voxel: one is needed")
    if volume.GetDimension() != 3:
        raise RejectedScan(f"{volume.GetDimension()}D image: a 3D volume is needed")
    unit = _itk_unit_mm(text)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(volume.GetDirection(), (3, 3)) * np.asarray(volume.GetSpacing())
    affine[:3, 3] = volume.GetOrigin()
    affine[:3] *= unit
    array = SimpleITK.GetArrayFromImage(volume).T
    return nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, dtype=array.dtype), unit


def _check_grid(image: nibabel.Nifti1Image) -> None:
    if image.ndim != 3:
        raise RejectedScan(f"{image.ndim}D image {image.shape}: a 3D volume is needed")
    if min(image.shape) == 0:
        raise RejectedScan(f"empty image: shape {image.shape}")
    if min(image.shape) == 1:
        raise RejectedScan(f"a single slice: shape {image.shape}, a 3D volume is needed")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufb":
        raise RejectedScan(f"colour or complex voxels ({dtype}): one number per voxel is needed")
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
