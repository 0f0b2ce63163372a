"""Structures that people drew (RTSTRUCT) or that are stored as pictures (SEG) → labels on the grid of their image."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from skimage.draw import polygon2mask

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.geometry import normal_of
from nnssl_plugin.intake.dicom.headers import SEGMENTATION, STRUCTURES
from nnssl_plugin.io.refusals import RejectedScan

OFF_PLANE = 0.5
"""Of the distance between slices, by which a contour may lie beside a slice and still belong to it."""
PARALLEL = 0.999
"""Least cosine between the normals of a segmentation's planes and of the image's."""


@dataclass(frozen=True)
class WantedStructure:
    """Structures whose name matches a pattern become a label."""

    pattern: str
    label: int

    @property
    def name(self) -> str:
        """The label's name in ``dataset.json``."""
        return re.sub(r"[^\w -]+", "", self.pattern).strip(" _-") or f"label{self.label}"

    def takes(self, names: Iterable[str]) -> bool:
        """Whether one of a structure's names matches, without regard to case."""
        return any(fnmatchcase(name.casefold(), self.pattern.casefold()) for name in names)


def parse_structures(texts: Sequence[str]) -> tuple[WantedStructure, ...]:
    """Texts such as ``GTV=1`` or ``*kidney*=2``.

    Raises:
        UserError: a text is none of these, or the labels are not 1, 2, … without a gap.
    """
    wanted = []
    for text in texts:
        pattern, _, label = text.rpartition("=")
        if not pattern.strip() or not label.strip().isdecimal() or int(label) == 0:
            raise UserError(f"--structures {text}: no name and label.", "Write: --structures 'GTV=1' '*lung*=2'")
        wanted.append(WantedStructure(pattern.strip(), int(label)))
    labels = {structure.label for structure in wanted}
    if labels != set(range(1, len(labels) + 1)):
        raise UserError(
            f"--structures: the labels are {', '.join(map(str, sorted(labels)))}.", "Number them 1, 2, … without a gap."
        )
    return tuple(wanted)


def label_names(wanted: Sequence[WantedStructure]) -> dict[str, int]:
    """``labels`` of ``dataset.json``; a label of several patterns is named by the first."""
    named = {structure.label: structure.name for structure in reversed(wanted)}
    return {"background": 0, **{named[label]: label for label in sorted(named)}}


def referenced_series(dataset: Any) -> set[str]:
    """Series that a structure set or segmentation says it was drawn on; empty where it says none."""
    found = {str(item.SeriesInstanceUID) for item in dataset.get("ReferencedSeriesSequence") or ()}
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            found |= {str(item.SeriesInstanceUID) for item in study.get("RTReferencedSeriesSequence") or ()}
    return found


def draw_labels(
    datasets: Sequence[Any], wanted: Sequence[WantedStructure], shape: Sequence[int], affine: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """The labels of an image.

    Where structures overlap, the one wanted later wins. Where several datasets hold a label, the last of them, which
    is to be the newest, is taken.

    Args:
        datasets: pydicom's datasets of structure sets and segmentations.
        wanted: what becomes a label.
        shape: (I, J, K) of the image: columns, rows, planes.
        affine: (4, 4), index → LPS mm.

    Returns:
        (I, J, K) uint8, and what is worth telling.

    Raises:
        RejectedScan: nothing that is wanted was drawn, or it lies outside of the image.
    """
    labels, notes, drawn = np.zeros(shape, dtype=np.uint8), [], {}
    for dataset in datasets:
        draw = _draw_segmentation if str(dataset.get("SOPClassUID", "")) == SEGMENTATION else _draw_contours
        for structure in wanted:
            mask = draw(dataset, structure, shape, affine, notes)
            if mask is None:
                continue
            if structure in drawn:
                notes.append(f"{structure.pattern}: several structure sets, the newest is taken")
            drawn[structure] = mask
    for structure in wanted:
        if structure in drawn:
            labels[drawn[structure]] = structure.label
    if not drawn:
        raise RejectedScan(f"no structure is named {' or '.join(structure.pattern for structure in wanted)}")
    if not labels.any():
        raise RejectedScan("the structures lie outside of the image")
    missing = [structure.pattern for structure in wanted if structure not in drawn]
    return labels, [*dict.fromkeys(notes), *([f"without {', '.join(missing)}"] if missing else [])]


def names_in(dataset: Any) -> list[str]:
    """The names of all structures of a dataset."""
    if str(dataset.get("SOPClassUID", "")) == STRUCTURES:
        return [str(item.get("ROIName", "")) for item in dataset.get("StructureSetROISequence") or ()]
    return [str(item.get("SegmentLabel", "")) for item in dataset.get("SegmentSequence") or ()]


def _draw_contours(dataset, structure, shape, affine, notes) -> np.ndarray | None:
    """(I, J, K) bool of the structure in a structure set, by the even-odd rule: a contour within another is a hole."""
    numbers = _numbers_of_rois(dataset, structure)
    if not numbers:
        return None
    to_index = np.linalg.inv(affine)
    mask, off_plane, drawn = np.zeros(shape, dtype=bool), 0, set()
    for roi in dataset.get("ROIContourSequence") or ():
        if int(roi.ReferencedROINumber) not in numbers:
            continue
        one = np.zeros(shape, dtype=bool)
        for contour in roi.get("ContourSequence") or ():
            if str(contour.get("ContourGeometricType", "")) != "CLOSED_PLANAR":
                continue
            points = np.reshape(np.asarray(contour.ContourData, dtype=np.float64), (-1, 3))
            points = points @ to_index[:3, :3].T + to_index[:3, 3]
            k = int(np.rint(points[:, 2].mean()))
            if np.abs(points[:, 2] - k).max() > OFF_PLANE or not 0 <= k < shape[2]:
                off_plane += 1
                continue
            one[:, :, k] ^= polygon2mask(shape[:2], points[:, :2])
            drawn.add(k)
        mask |= one
    if off_plane:
        notes.append(f"{structure.pattern}: {off_plane} contours lie outside or across the slices")
    if drawn and len(drawn) < max(drawn) - min(drawn) + 1:
        notes.append(f"{structure.pattern}: drawn on {len(drawn)} of {max(drawn) - min(drawn) + 1} slices")
    return mask


def _numbers_of_rois(dataset: Any, structure: WantedStructure) -> set[int]:
    """Structures by their name, or by their kind (``GTV``, ``ORGAN``)."""
    kinds = {
        int(item.ReferencedROINumber): str(item.get("RTROIInterpretedType") or "")
        for item in dataset.get("RTROIObservationsSequence") or ()
    }
    return {
        int(item.ROINumber)
        for item in dataset.get("StructureSetROISequence") or ()
        if structure.takes((str(item.get("ROIName", "")), kinds.get(int(item.ROINumber), "")))
    }


def _draw_segmentation(dataset, structure, shape, affine, notes) -> np.ndarray | None:
    """(I, J, K) bool of the structure in a segmentation: every plane of it is put on the slice nearest to it."""
    numbers = {
        int(item.SegmentNumber)
        for item in dataset.get("SegmentSequence") or ()
        if structure.takes((str(item.get("SegmentLabel", "")),))
    }
    if not numbers:
        return None
    pixels = np.atleast_3d(dataset.pixel_array)
    pixels = pixels if dataset.pixel_array.ndim == 3 else dataset.pixel_array[np.newaxis]
    threshold = int(dataset.get("MaximumFractionalValue") or 1) / 2  # binary: 0 or 1
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    mask = np.zeros(shape, dtype=bool)
    for plane, group in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        number = int(_first(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        if number in numbers:
            _paste(mask, plane > threshold, group, shared, affine)
    return mask


def _paste(mask: np.ndarray, plane: np.ndarray, group: Any, shared: Any, affine: np.ndarray) -> None:
    """Set the voxels of ``mask``, on the slice nearest to a plane, where the plane (rows, columns) is set."""
    position = np.array(_first(group, shared, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    orientation = np.array(_first(group, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    spacing = np.array(_first(group, shared, "PixelMeasuresSequence").PixelSpacing, dtype=np.float64)
    normal, image_normal = normal_of(orientation), np.cross(affine[:3, 0], affine[:3, 1])
    image_normal /= np.linalg.norm(image_normal)
    if abs(normal @ image_normal) < PARALLEL:
        raise RejectedScan("the segmentation's planes are not parallel to the image's")
    step = affine[:3, 2] @ image_normal
    k = int(np.rint((position - affine[:3, 3]) @ image_normal / step))
    if not 0 <= k < mask.shape[2]:
        return
    i, j = np.meshgrid(np.arange(mask.shape[0]), np.arange(mask.shape[1]), indexing="ij")
    points = affine[:3, 3] + i[..., None] * affine[:3, 0] + j[..., None] * affine[:3, 1] + k * affine[:3, 2] - position
    column = np.rint(points @ orientation[:3] / spacing[1]).astype(int)
    row = np.rint(points @ orientation[3:] / spacing[0]).astype(int)
    inside = (column >= 0) & (column < plane.shape[1]) & (row >= 0) & (row < plane.shape[0])
    mask[:, :, k][inside] |= plane[row[inside], column[inside]]


def _first(group: Any, shared: Any, sequence: str) -> Any:
    for holder in (group, shared):
        found = holder.get(sequence) if holder is not None else None
        if found:
            return found[0]
    raise RejectedScan(f"the segmentation has no {sequence}")
