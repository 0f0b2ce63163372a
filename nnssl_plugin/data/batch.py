"""What one step of a method sees, and what the method needs of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Batch = dict[str, Any]
"""What one step sees; tensors are on the device, B samples, spatial sizes in voxels of the plan's spacing:

``image`` (B, C, *window) float32, the plan's normalised intensities, 0 outside the case;
``available`` (B, C) bool, the channels that the case really has;
``kind``, a text on the host: what the plan calls the images of this dataset;
``cases`` list of B names and ``places`` list of B :class:`Place`, both on the host;
``origin``, ``extent`` and ``case_shape`` (B, dims) float, the same places on the device;
with triplets also ``plane`` (B,) int (index into ``planes.PLANES``), ``slice_axis`` (B,) int (spatial axis of ``image``
that the slice is normal to), ``slice_position`` (B,) float in [0, 1] (place of the slice along that axis of the
window), ``image_embedding`` and ``text_embedding`` (B, E) float32;
with labels, in validation batches of datasets that label structures, also ``labels`` (B, *window) int16: the case's
segmentation in the same window, -1 outside the case.
"""


@dataclass(frozen=True)
class Place:
    """Where a window lies in its case, in voxels of the preprocessed case along its three axes.

    A window of a 2D configuration is one voxel thick along the first, so ``origin[0]`` is the number of its slice.
    """

    origin: tuple[int, int, int]
    """First voxel of the window, negative where the window begins before the case."""
    extent: tuple[int, int, int]
    """Size of the piece of the case that the window shows; not the window's own where it was resized."""
    case_shape: tuple[int, int, int]
    """Size of the case."""

    @classmethod
    def of(cls, origin: Sequence[int], extent: Sequence[int], case_shape: Sequence[int]) -> "Place":
        """From three sequences of three whole numbers, arrays of NumPy included."""
        return cls(_three(origin), _three(extent), _three(case_shape))


@dataclass(frozen=True)
class Needs:
    """What the batches of a method must hold.

    Raises:
        ValueError: for numbers out of range, or neighbours where there are none.
    """

    window: Literal["crop", "whole", "fit", "slice"] = "crop"
    """``crop``: a random window; ``whole``: the whole case resized to the window, its proportions lost; ``fit``: the
    whole case, its plane (the last two axes) at the largest factor at which it fits into the window, 0 beside it, and
    its slices at a factor of their own; in 2D a random slice; ``slice``: a random window that contains the slice of one
    of the case's triplets."""
    foreground_share: float = 1 / 3
    """Share of the windows of ``crop`` and ``fit`` that contain a foreground voxel for certain (a third is nnU-Net's
    oversampling). 1.0: all of them, so that a 2D method meets no slice without foreground, but in cases that have none.
    """
    placement: Literal["inside", "free"] = "inside"
    """``inside``: windows stay inside the case, and a case that is smaller lies in the middle. ``free``: a smaller case
    lies anywhere in the window, and the slice of a triplet anywhere in the window's middle half, whichever slice it is,
    padded where the case ends; so ``slice_position`` says nothing about the place of the slice in the case."""
    margin: float | tuple[float, ...] = 1.0
    """Size of the window over the plan's patch size, for methods that move inside it; one number, or one per axis."""
    triplets: bool = False
    """The batch brings one of each case's slices, its place, and the frozen embeddings of slice and text. All slices of
    a step are of one plane where every case has slices of a common one."""
    modalities: int = 1
    """Channels that a case must really have to be used."""
    dimensions: tuple[int, ...] = (2, 3)
    """Spatial dimensions of the configurations that the method supports."""
    slices_per_case: int = 1
    """Consecutive rows of a batch that show one case, with ``crop`` and without triplets: in 2D slices that follow one
    another, in 3D windows each moved by at most a quarter of its size from the one before. Where the batch size is no
    multiple, the last case has fewer."""
    unifies: bool = False
    """``views`` bring images of any of ``dimensions``, of any size and number of channels, to what the network reads,
    so that the datasets of one pretraining may differ in all of that."""
    labels: bool = False
    """Validation batches bring ``labels`` for diagnostics, where the dataset labels structures; training batches
    never do."""

    def __post_init__(self) -> None:
        if not 0 <= self.foreground_share <= 1:
            raise ValueError(f"foreground_share must lie in [0, 1], not be {self.foreground_share}")
        if self.slices_per_case < 1:
            raise ValueError(f"slices_per_case must be at least 1, not {self.slices_per_case}")
        if self.slices_per_case > 1 and (self.window != "crop" or self.triplets):
            raise ValueError("slices_per_case is for windows of 'crop' without triplets: others have no neighbours")


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = values
    return int(first), int(second), int(third)
