"""Small DICOM exports, made with pydicom: series of a phantom, enhanced objects, structure sets and segmentations."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RTStructureSetStorage,
    SegmentationStorage,
    generate_uid,
)

CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
AXIAL = (1, 0, 0, 0, 1, 0)
NAME = "Secret^Patient"
"""What no output may show, as the patient's name; the ID holds it too."""


def phantom(slices=8, rows=20, columns=24, seed=0):
    """Planes (slices, rows, columns) int16: a bright ball in noise; for CT around -1000 outside of it."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (slices, rows, columns)), indexing="ij")
    ball = np.linalg.norm(axes, axis=0) < 0.8
    return (1000 * ball + rng.integers(0, 60, ball.shape)).astype(np.int16)


def write_series(
    folder,
    planes,
    *,
    modality="MR",
    origin=(-30.0, -20.0, 5.0),
    step=(0.0, 0.0, 3.0),
    orientation=AXIAL,
    spacing=(1.5, 1.25),
    uids=None,
    first=1,
    change=None,
    **attributes,
):
    """One file per plane; the datasets.

    Args:
        folder: where to.
        planes: (N, rows, columns).
        origin, step: LPS mm, of the first plane and from one to the next.
        uids: (study, series); None: new ones.
        first: the first plane's InstanceNumber.
        change: function (dataset, index) for what differs between planes, called before the file is written.
        attributes: of every plane.
    """
    study, series = uids or (generate_uid(), generate_uid())
    written = []
    for index, plane in enumerate(planes):
        dataset = image(plane, CLASSES[modality], modality, study, series)
        dataset.ImagePositionPatient = [float(o + index * s) for o, s in zip(origin, step, strict=True)]
        dataset.ImageOrientationPatient = [float(x) for x in orientation]
        dataset.PixelSpacing, dataset.SliceThickness = list(spacing), 3
        dataset.InstanceNumber = first + index
        if modality == "CT":
            dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
        for name, value in attributes.items():
            setattr(dataset, name, value)
        if change:
            change(dataset, index)
        save(dataset, Path(folder, f"IM{first + index:04d}_{dataset.SOPInstanceUID[-6:]}.dcm"))
        written.append(dataset)
    return written


def image(plane, sop_class, modality, study, series):
    """A dataset with the pixels of a plane (rows, columns) or of several frames."""
    dataset = empty(sop_class, modality, study, series)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = plane.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.PixelData = np.ascontiguousarray(plane, dtype="<i2").tobytes()
    return dataset


def empty(sop_class, modality, study, series):
    """A dataset with the identifiers that every file has."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = study, series, modality
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = NAME, "Secret-0815", "19500101"
    dataset.InstitutionName, dataset.AccessionNumber = "Secret Hospital", "Secret-1"
    dataset.FrameOfReferenceUID = f"{study[:60]}.1"
    return dataset


def save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def enhanced(path, planes, *, spacing=(1.5, 1.25), step=3.0, per_frame=None, order=None, orientation=AXIAL):
    """An enhanced MR object.

    Args:
        planes: (N, rows, columns), along the normal.
        per_frame: function (functional group, index) for what a frame has of its own.
        order: in which the frames are stored; None: as they lie.
    """
    order = list(range(len(planes)) if order is None else order)
    dataset = image(planes[order], EnhancedMRImageStorage, "MR", generate_uid(), generate_uid())
    dataset.NumberOfFrames = len(order)
    shared = Dataset()
    shared.PixelMeasuresSequence = [item(PixelSpacing=list(spacing), SliceThickness=step)]
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=list(map(float, orientation)))]
    dataset.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for index in order:
        group = Dataset()
        group.PlanePositionSequence = [item(ImagePositionPatient=[-30.0, -20.0, 5.0 + step * index])]
        if per_frame:
            per_frame(group, index)
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    save(dataset, Path(path))
    return dataset


def item(**attributes):
    """An item of a sequence."""
    dataset = Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def structure_set(path, images, structures, *, kinds=None, referenced=True, date="20200101"):
    """An RTSTRUCT.

    Args:
        images: datasets of the series on which it is drawn.
        structures: name → list of contours, each (N, 3) LPS mm.
        kinds: name → RTROIInterpretedType.
        referenced: whether it names the series.
    """
    first = images[0]
    dataset = empty(RTStructureSetStorage, "RTSTRUCT", first.StudyInstanceUID, generate_uid())
    dataset.StructureSetDate = date
    dataset.StructureSetROISequence = [item(ROINumber=n, ROIName=name) for n, name in enumerate(structures, 1)]
    dataset.RTROIObservationsSequence = [
        item(ObservationNumber=n, ReferencedROINumber=n, RTROIInterpretedType=(kinds or {}).get(name, "ORGAN"))
        for n, name in enumerate(structures, 1)
    ]
    dataset.ROIContourSequence = [
        item(ReferencedROINumber=n, ContourSequence=[
            item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points),
                 ContourData=[f"{value:.6f}" for value in np.ravel(points)]) for points in contours])
        for n, contours in enumerate(structures.values(), 1)
    ]  # fmt: skip
    if referenced:
        series = item(SeriesInstanceUID=first.SeriesInstanceUID)
        study = item(RTReferencedSeriesSequence=[series])
        dataset.ReferencedFrameOfReferenceSequence = [
            item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
        ]
    save(dataset, Path(path))
    return dataset


def segmentation(path, images, segments, *, spacing=(1.5, 1.25), origin=(-30.0, -20.0, 5.0), step=3.0):
    """A binary SEG on a grid of its own: label → bool array (slices, rows, columns); empty planes are left out."""
    first = images[0]
    dataset = empty(SegmentationStorage, "SEG", first.StudyInstanceUID, generate_uid())
    dataset.SegmentationType = "BINARY"
    dataset.ReferencedSeriesSequence = [item(SeriesInstanceUID=first.SeriesInstanceUID)]
    dataset.SegmentSequence = [item(SegmentNumber=n, SegmentLabel=label) for n, label in enumerate(segments, 1)]
    shared = Dataset()
    shared.PixelMeasuresSequence = [item(PixelSpacing=list(spacing), SliceThickness=step)]
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=list(map(float, AXIAL)))]
    dataset.SharedFunctionalGroupsSequence = [shared]
    groups, planes = [], []
    for number, mask in enumerate(segments.values(), 1):
        for k in np.flatnonzero(mask.any(axis=(1, 2))):
            group = Dataset()
            group.PlanePositionSequence = [item(ImagePositionPatient=[origin[0], origin[1], origin[2] + step * k])]
            group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number)]
            groups.append(group)
            planes.append(mask[k])
    dataset.PerFrameFunctionalGroupsSequence = groups
    bits = np.packbits(np.stack(planes).ravel(), bitorder="little").tobytes()
    dataset.PixelData = bits + b"\0" * (len(bits) % 2)
    dataset.NumberOfFrames, (dataset.Rows, dataset.Columns) = len(planes), planes[0].shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = dataset.PixelRepresentation = 0
    save(dataset, Path(path))
    return dataset
