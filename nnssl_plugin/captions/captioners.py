"""Who describes a slice: the interface of a captioner, and the one that states only what the file knows."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

NORMALISERS = {"nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"}
"""Channel names by which nnU-Net chooses a normalisation; they say nothing about the modality."""

ENDS = {"axial": ("inferior", "superior"), "coronal": ("posterior", "anterior"), "sagittal": ("left", "right")}
"""From where to where the slices of a plane are counted: along the axes of RAS."""


@dataclass(frozen=True)
class SliceFacts:
    """What is known about a slice without looking at it."""

    case: str
    modality: str  # the name of the channel, empty where it names a normalisation
    plane: str
    position: float  # 0 at the first of ENDS[plane] to 1 at the second
    extent_mm: tuple[float, float]  # width and height of the slice as viewed
    spacing_mm: float  # distance between neighbouring slices of this plane
    body_part: str  # as the user gave it, or empty


class Captioner(Protocol):
    """Describes one slice in words; another captioner (a multimodal language model, say) has the same two members."""

    name: str

    def describe(self, slice_image: np.ndarray, facts: SliceFacts) -> str:
        """The text of one slice.

        Args:
            slice_image: (H, W, 3) uint8, oriented for viewing (see ``triplets.slice_image``).
            facts: what the file knows.

        Returns:
            one paragraph without line breaks.
        """
        ...


class TemplateCaptioner:
    """States modality, plane, place, extent and (where given) body part; never looks at the pixels."""

    name = "template"

    def describe(self, slice_image: np.ndarray, facts: SliceFacts) -> str:
        """See :class:`Captioner`."""
        low, high = ENDS[facts.plane]
        subject = " ".join(word for word in (facts.plane, facts.modality, "slice") if word)
        subject += f" of the {facts.body_part}" if facts.body_part else ""
        third = (f"{low} third", "middle third", f"{high} third")[min(int(facts.position * 3), 2)]
        article = "An" if facts.plane == "axial" else "A"
        width, height = facts.extent_mm
        return (
            f"{article} {subject}, in the {third} of the volume, "
            f"{facts.position:.0%} of the way from {low} to {high}. "
            f"It shows {width:.0f} mm by {height:.0f} mm; neighbouring slices are {facts.spacing_mm:.2g} mm apart."
        )


def modality_of(dataset_json: dict) -> str:
    """The name of the first channel, or an empty text where it only names a normalisation.

    Args:
        dataset_json: content of nnU-Net's dataset.json (``channel_names``, or ``modality`` in old files).
    """
    names = dataset_json.get("channel_names") or dataset_json.get("modality") or {}
    name = str(names.get("0", ""))
    return "" if name.casefold() in NORMALISERS else name


CAPTIONERS = {TemplateCaptioner.name: TemplateCaptioner}
"""Name on the command line → captioner."""
