"""Reading NRRD and MetaImage through ITK, which opens whatever a header names and takes every unit for mm."""

import math
import re
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.io.refusals import RejectedScan, check_memory, check_spacing

ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
ITK_UNIT_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3}
"""Texts of NRRD ("space units") and MetaImage ("DistanceUnits") → mm; other texts are refused."""

_HEADER_BYTES = 65536  # more than the text header of any NRRD or MetaImage file in use
_ITK_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_DATA_FILE = re.compile(r"^\s*(?:ElementDataFile\s*[=:]|data ?file\s*:)[ \t]*(.*?)\s*$", re.MULTILINE | re.IGNORECASE)
_METAIMAGE_HEADER = re.compile(r".*?^\s*ElementDataFile\s*[=:][^\n]*", re.MULTILINE | re.DOTALL)
_NRRD_HEADER = re.compile(r".*?\r?\n\r?\n", re.DOTALL)


def file_parts(path: Path) -> list[Path]:
    """The files that hold a scan: the file itself, and the data file that a detached header (.mhd, .nhdr) names, where
    it is one in the header's folder."""
    if path.suffix.lower() not in (".mhd", ".nhdr") or not path.is_file():
        return [path]
    named = _DATA_FILE.search(_text_header(path))
    data = path.parent / named[1] if named and named[1] else path
    return [path, data] if data.is_file() and data != path and _is_beside(data, path) else [path]


def read_itk(path: Path) -> tuple[nibabel.Nifti1Image, float]:
    """The image in mm, and the unit of the file in mm.

    Raises:
        RejectedScan: it is no 3D volume of one value per voxel, or names a file outside of its folder.
        RuntimeError: ITK cannot read it.
    """
    import SimpleITK

    text = _text_header(path)
    _check_data_file(text, path)
    # ITK turns a negative spacing into a flipped axis without a word
    stated = re.search(r"^(?:ElementSpacing\s*=|spacings:)([-+0-9.eE \t]+)$", text, re.MULTILINE)
    if stated:
        check_spacing([float(number) for number in stated.group(1).split()])
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(_ITK_READERS[path.suffix.lower()])
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


def _itk_unit_mm(header: str) -> float:
    stated = re.findall(r"^(?:DistanceUnits\s*=|space units:)\s*(\S.*?)\s*$", header, re.MULTILINE | re.IGNORECASE)
    units = {text.lower() for text in re.split(r"[\s\"]+", " ".join(stated)) if text} - {"none", "?"}
    if len(units) > 1 or not units <= set(ITK_UNIT_MM):
        raise RejectedScan(f"unit of length {', '.join(sorted(units))}: convert it to mm")
    return ITK_UNIT_MM[units.pop()] if units else 1.0


def _text_header(path: Path) -> str:
    """The text at the start of a NRRD or MetaImage file, as Latin-1."""
    with path.open("rb") as stream:
        return stream.read(_HEADER_BYTES).decode("latin-1")


def _check_data_file(text: str, path: Path) -> None:
    """ITK opens whatever a header names: let it name the file itself, or one other in the header's folder."""
    metaimage = path.suffix.lower() in (".mha", ".mhd")
    header = (_METAIMAGE_HEADER if metaimage else _NRRD_HEADER).match(text)
    if header is None and len(text) == _HEADER_BYTES:
        raise RejectedScan(f"unreadable: its header does not end within {_HEADER_BYTES} bytes")
    named = [match[1] for match in _DATA_FILE.finditer(header[0] if header else text)]
    if path.suffix.lower() in (".mha", ".nrrd") and named in ([], ["LOCAL"]):
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
