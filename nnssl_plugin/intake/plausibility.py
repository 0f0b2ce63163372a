"""Which images are set aside although they can be read: segmentations, and images of another modality."""

import re
from pathlib import PurePath

import numpy as np

AIR_HU = -500
"""Images that go below are taken for CT."""
TISSUE_HU = -50
"""A CT goes below: fat has about -100 HU, and noise reaches there in every other tissue."""
MOST_LABELS = 256
"""Different values that a segmentation may have; whole-body atlases have about 120."""
EQUAL_NEIGHBOURS = 0.5
"""Share of neighbouring voxels, beside the background, of which a segmentation has at least so many with one value; of
an image only where noise is less than the step between two stored values."""
LABEL_WORDS = {
    *("seg", "segs", "segmentation", "segmentations", "mask", "masks", "label", "labels", "labelmap", "roi", "rois"),
    *("gt", "groundtruth", "annotation", "annotations", "contour", "contours"),
}
MODALITY_WORDS = {
    "CT": {"ct", "cta", "cect", "ldct"},
    "PET": {"pet", "suv", "fdg"},
    "MR": {"mr", "mri", "t1w", "t2w", "flair", "dwi", "adc"},
}
"""Modality → words in names of files and folders that say it."""
NO_MODALITY = {"t1", "t2"}
"""Words that name a sequence or a point in time: a name with no other word of a modality contradicts none."""
_LOOKED_AT = 1 << 16  # voxels by which most images are told from segmentations


def doubt_by_name(relative: PurePath, modality: str) -> str | None:
    """Why a name speaks against an image of a modality; None where it does not."""
    return named_as_labels(relative) or named_as_another_modality(relative, modality)


def named_as_labels(relative: PurePath) -> str | None:
    """Why the name of a file, or of a folder on the way to it, speaks for a segmentation; None where it does not.

    Args:
        relative: path below the folder of the scans; ``labelsTr/case.nii.gz`` and ``CT_mask.nii.gz`` are named so.
    """
    for part in reversed(relative.parts):
        words = LABEL_WORDS & _words(part)
        if words:
            return f"named as a segmentation ({min(words)} in {part})"
    return None


def named_as_another_modality(relative: PurePath, modality: str) -> str | None:
    """Why a name contradicts a modality, told by the part nearest to the file that names any; None where none does."""
    if modality not in MODALITY_WORDS:
        return None
    for part in reversed(relative.parts):
        words = _words(part)
        named = [name for name, known in MODALITY_WORDS.items() if known & words]
        if named:
            return None if modality in named else f"its name says {' and '.join(named)}, not {modality} ({part})"
        if NO_MODALITY & words:
            return None
    return None


def is_label_like(array: np.ndarray) -> bool:
    """Whether an image has the values of a segmentation: few whole numbers from 0, in regions of one value each.

    Args:
        array: (I, J, K) or (H, W), finite.
    """
    some = array.ravel(order="K")[:: max(1, array.size // _LOOKED_AT)]
    if not _may_be_labels(some) or not _may_be_labels(array):
        return False
    values, counts = np.unique(array, return_counts=True)
    return len(values) == 2 or _share_of_equal_neighbours(array, values[counts.argmax()]) >= EQUAL_NEIGHBOURS


def looks_like_ct(array: np.ndarray) -> bool:
    """Whether an image has values of air in HU."""
    return bool(array.min() < AIR_HU)


def contradiction(array: np.ndarray, modality: str) -> str | None:
    """Why intensities contradict a modality; None where they do not, and for what is neither MR, PET nor CT."""
    lowest = float(array.min())
    if modality == "CT" and lowest > TISSUE_HU:
        return f"no CT in HU: its lowest value is {lowest:g}, that of a CT lies below {TISSUE_HU}"
    if modality in ("MR", "PET") and looks_like_ct(array):
        return f"looks like CT, not {modality}: its lowest value is {lowest:g}, as of air in HU"
    return None


def _may_be_labels(array: np.ndarray) -> bool:
    if array.min() < 0 or not (array == np.rint(array)).all():
        return False
    return len(np.unique(array)) <= MOST_LABELS


def _share_of_equal_neighbours(array: np.ndarray, background: float) -> float:
    """Of pairs of voxels side by side, not both of the background, the share with one value."""
    pairs = equal = 0
    for axis in range(array.ndim):
        lines = np.moveaxis(array, axis, 0)
        same = lines[:-1] == lines[1:]
        pairs += same.size - int(np.count_nonzero(same & (lines[:-1] == background)))
        equal += int(np.count_nonzero(same & (lines[:-1] != background)))
    return equal / max(1, pairs)


def _words(name: str) -> set[str]:
    """The words of a name in lower case: ``labelsTr`` → labels, tr; ``CT_mask2.nii`` → ct, mask, mask2, nii."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return {*re.findall(r"[a-z]+", apart), *re.findall(r"[a-z]+[0-9][a-z]*", apart)}
