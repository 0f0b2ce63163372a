"""What the headers of an export say: for every image where its planes lie, and what keeps them apart from others."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from nnssl_plugin.intake.dicom.files import DICOM_ENDINGS, ExportFile, open_file, require_pydicom, starts_as_dicom

SHOWN = (
    "Modality", "SeriesDescription", "ProtocolName", "SequenceName", "StudyDescription", "BodyPartExamined",
    "ImageType", "SeriesNumber", "Manufacturer", "ManufacturerModelName", "ScanningSequence", "SliceThickness",
    "ConvolutionKernel", "ContrastBolusAgent", "RepetitionTime", "EchoTime", "FlipAngle", "Units", "Rows", "Columns",
    "BurnedInAnnotation", "PhotometricInterpretation",
)  # fmt: skip
"""Attributes of a series that its table shows and that rules may name."""
_OF_FILES = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID"),
    *("NumberOfFrames", "SamplesPerPixel", "ConversionType", "SequenceOfUltrasoundRegions", "StudyDate", "SeriesDate"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated", "AcquisitionDate"),
)
_OF_FRAMES = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "StackID": "FrameContentSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
    "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence",
    "TriggerTime": "",
    "TemporalPositionIdentifier": "",
    "AcquisitionNumber": "",
    "AcquisitionTime": "",
    "ContentTime": "",
    "InstanceNumber": "",
    "ComplexImageComponent": "",
    "InversionTime": "",
    "EchoNumbers": "",
}
"""Attribute of a plane → the sequence that holds it in an enhanced (multi-frame) object."""
_PRIVATE_B_VALUES = ((0x0019, 0x100C), (0x0043, 0x1039), (0x2001, 0x1003))
"""Siemens, GE, Philips; GE adds 10^9 to the first of four numbers."""
SEGMENTATION, STRUCTURES = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.3"
"""SOP classes of segmentations and of radiotherapy's structure sets."""

MOST_RATIO = 4000
"""Bytes of pixels that one byte of a file may promise; a blank plane in JPEG 2000 comes near to 2000."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """One plane of an image."""

    file: ExportFile
    number: int  # within its file, from 0
    uid: str  # of its instance
    position: Numbers | None  # (x, y, z) of the first voxel's centre in DICOM's patient coordinates (LPS), mm
    orientation: Numbers | None  # six cosines: along a row, along a column
    spacing: Numbers | None  # mm between rows, between columns
    correction: tuple[float, float]  # factor and offset for values to which GDCM applied the rescale of frame 0
    apart: tuple[str, ...]  # kind of image, kernel, echo, b-value, time: frames that differ are of other images
    acquisition: str  # number of the acquisition
    moment: tuple[float, ...]  # trigger, acquisition time, content time, instance number: the order within a position


@dataclass(frozen=True, slots=True)
class Instance:
    """The header of one DICOM file."""

    file: ExportFile
    uid: str
    sop_class: str
    series: str
    study: str
    patient: str
    frame_of_reference: str
    shown: dict[str, str] = field(repr=False)  # attribute of SHOWN → its text
    colour: bool = False
    captured: bool = False  # digitised, or made on a workstation
    ultrasound_regions: bool = False  # parts of the picture are ultrasound; the rest may hold texts
    frames: tuple[Frame, ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether it has planes to be made a volume of; a segmentation has, and is none."""
        return bool(self.frames) and self.sop_class != SEGMENTATION


@dataclass(frozen=True)
class Unreadable:
    """A file that should be DICOM and cannot be read."""

    file: ExportFile
    reason: str


def read_headers(files: Iterable[ExportFile]) -> Iterator[Instance | Unreadable | None]:
    """The header of each file in turn, None for what is no DICOM file.

    Raises:
        UserError: pydicom is not installed.
    """
    require_pydicom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that break the standard: those that matter are checked below
        for file in files:
            yield _read_or_refuse(file)


def read_whole(path: Path) -> Any:
    """The whole dataset of a file, pixels included, as pydicom has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require_pydicom().dcmread(path, force=True)


def _read_or_refuse(file: ExportFile) -> Instance | Unreadable | None:
    certain = starts_as_dicom(file)
    if not certain and not (file.name.lower().endswith(DICOM_ENDINGS[:-1]) or "." not in file.name):
        return None
    try:
        with open_file(file) as stream:
            header = require_pydicom().dcmread(
                stream, stop_before_pixels=True, force=True, specific_tags=[*_OF_FILES, *SHOWN, *_OF_FRAMES,
                                                                            *_PRIVATE_B_VALUES])  # fmt: skip
        if not header.get("SOPClassUID") and not header.get("Modality"):
            return Unreadable(file, "damaged: no DICOM header") if certain else None
        return _instance(file, header)
    except Exception as error:  # whatever pydicom raises for one file, the others go on
        return Unreadable(file, f"damaged: {type(error).__name__}: {str(error)[:120]}") if certain else None


def _instance(file: ExportFile, header: Any) -> Instance:
    sop_class = str(header.get("SOPClassUID", ""))
    is_drawn = "Rows" in header and "Columns" in header
    count = int(header.get("NumberOfFrames") or 1) if is_drawn else 0
    promised = count * int(header.get("Rows") or 0) * int(header.get("Columns") or 0) * 2
    if promised > MOST_RATIO * file.size:
        raise ValueError(f"the header promises {promised} bytes of pixels, the file has {file.size}")
    kind = str(header.get("ConversionType", ""))
    return Instance(
        file=file,
        uid=str(header.get("SOPInstanceUID", "")),
        sop_class=sop_class,
        series=str(header.get("SeriesInstanceUID", "")),
        study=str(header.get("StudyInstanceUID", "")),
        patient=str(header.get("PatientID", "")),
        frame_of_reference=str(header.get("FrameOfReferenceUID", "")),
        shown=_shared_texts(tuple((name, _text(header.get(name))) for name in SHOWN if header.get(name) is not None)),
        colour=int(header.get("SamplesPerPixel") or 1) > 1,
        captured=bool(kind) or sop_class.startswith("1.2.840.10008.5.1.4.1.1.7"),
        ultrasound_regions="SequenceOfUltrasoundRegions" in header,
        frames=tuple(_frame(file, header, number) for number in range(count)),
    )


@lru_cache(maxsize=4096)
def _shared(value: Any) -> Any:
    """One object for equal values: the planes of a series have most of them in common."""
    return value


@lru_cache(maxsize=4096)
def _shared_texts(items: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The same for a dictionary, which nobody changes."""
    return dict(items)


def _correction(header: Any, number: int) -> tuple[float, float]:
    """(a, b) with a (s₀ v + b₀) + b = s v + b′: GDCM rescales every frame v of a file as frame 0."""
    (slope, intercept), (first_slope, first_intercept) = (_rescale(header, frame) for frame in (number, 0))
    factor = slope / first_slope
    return factor, intercept - factor * first_intercept


def _rescale(header: Any, number: int) -> tuple[float, float]:
    stated = (_of_frame(header, number, name, _OF_FRAMES[name]) for name in ("RescaleSlope", "RescaleIntercept"))
    slope, intercept = (_number(value, default) for value, default in zip(stated, (1.0, 0.0), strict=True))
    return slope or 1.0, intercept


def _frame(file: ExportFile, header: Any, number: int) -> Frame:
    value = {name: _of_frame(header, number, name, sequence) for name, sequence in _OF_FRAMES.items()}
    echo = value["EffectiveEchoTime"] if value["EffectiveEchoTime"] is not None else header.get("EchoTime")
    moment = value["TemporalPositionIndex"] or value["TemporalPositionIdentifier"]
    trigger = value["NominalCardiacTriggerDelayTime"] or value["TriggerTime"]
    apart = (
        _kind_of_frame(header, number),
        header.get("ConvolutionKernel"),
        None if echo in (None, "") else round(float(echo), 1),  # some scanners state another hundredth per slice
        _b_value(header, value["DiffusionBValue"]),
        moment,
        *(value[name] for name in ("EchoNumbers", "InversionTime", "StackID", "ComplexImageComponent")),
    )
    return Frame(
        file=file,
        number=number,
        uid=str(header.get("SOPInstanceUID", "")),
        position=_numbers(value["ImagePositionPatient"], 3),
        orientation=_shared(_numbers(value["ImageOrientationPatient"], 6)),
        spacing=_shared(_numbers(value["PixelSpacing"], 2)),
        correction=(1.0, 0.0) if number == 0 else _correction(header, number),
        apart=_shared(tuple(_text(part) for part in apart)),
        acquisition=_text(value["AcquisitionNumber"] or value["FrameAcquisitionNumber"]),
        moment=tuple(
            _number(part, 0.0)
            for part in (trigger, value["AcquisitionTime"], value["ContentTime"], value["InstanceNumber"], number)
        ),
    )


def _of_frame(header: Any, number: int, name: str, sequence: str) -> Any:
    """An attribute of a plane: from its own group, the group that all share, or the file itself."""
    own = header.get("PerFrameFunctionalGroupsSequence") or ()
    groups = (*own[number : number + 1], *(header.get("SharedFunctionalGroupsSequence") or ()))
    for group in groups if sequence else ():
        for item in group.get(sequence) or ():
            if item.get(name) is not None:
                return item.get(name)
    return header.get(name)


def _kind_of_frame(header: Any, number: int) -> str:
    """``ImageType``: magnitude and phase, water and fat, in and out of phase differ there."""
    for sequence in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
        found = _of_frame(header, number, "FrameType", sequence)
        if found is not None:
            return _text(found)
    return _text(header.get("ImageType"))


def _b_value(header: Any, stated: Any) -> str:
    if stated is not None:
        return _text(float(stated))
    for tag in _PRIVATE_B_VALUES:
        element = header.get(tag)
        if element is not None and element.value not in (None, b"", ""):
            return _private_number(element.value)
    return ""


def _private_number(value: Any) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else _text(value)
    first = text.split("\\")[0].strip().strip("\0")
    try:
        return _text(float(first) % 1e9)
    except ValueError:
        return first if first.isprintable() else ""


def _text(value: Any) -> str:
    """Several values with a backslash between, as DICOM stores them; numbers in their shortest form."""
    if value is None:
        return ""
    if isinstance(value, str | bytes):
        return str(value).strip()
    if isinstance(value, Iterable):
        return "\\".join(_text(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value).strip()


def _numbers(value: Any, count: int) -> Numbers | None:
    if value is None or len(value) != count:
        return None
    return tuple(float(part) for part in value)


def _number(value: Any, default: float) -> float:
    try:
        return default if value is None else float(value)
    except ValueError:
        return default
