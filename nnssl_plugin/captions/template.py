"""The captioner that states only what the file knows: modality, plane, place, extent and body part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnssl_plugin.captions.captioners import SliceFacts

ENDS = {"axial": ("inferior", "superior"), "coronal": ("posterior", "anterior"), "sagittal": ("left", "right")}
"""From where to where the slices of a plane are counted: along the axes of RAS."""


@dataclass(frozen=True)
class TemplateOptions:
    """Which sentences the template writes."""

    place: bool = True
    """In which third of the volume the slice lies, and how far along."""
    size: bool = True
    """Width and height of the slice, and the distance between slices."""


class TemplateCaptioner:
    """Never looks at the pixels."""

    name = "template"
    Options = TemplateOptions

    def __init__(self, options: TemplateOptions | None = None):
        self.options = options or TemplateOptions()

    def describe(self, slices: Sequence[np.ndarray], facts: Sequence[SliceFacts]) -> list[str]:
        """See :class:`~nnssl_plugin.captions.captioners.Captioner`."""
        return [self._text(one) for one in facts]

    def _text(self, facts: SliceFacts) -> str:
        subject = " ".join(word for word in (facts.plane, facts.modality, "slice") if word)
        subject += f" of the {facts.body_part}" if facts.body_part else ""
        text = f"{'An' if facts.plane == 'axial' else 'A'} {subject}"
        if self.options.place:
            text += f", {_place(facts)}"
        if self.options.size:
            width, height = facts.extent_mm
            text += (
                f". It shows {width:.0f} mm by {height:.0f} mm; neighbouring slices are {facts.spacing_mm:.2g} mm apart"
            )
        return f"{text}."


def _place(facts: SliceFacts) -> str:
    low, high = ENDS[facts.plane]
    third = (f"{low} third", "middle third", f"{high} third")[min(int(facts.position * 3), 2)]
    return f"in the {third} of the volume, {facts.position:.0%} of the way from {low} to {high}"
