"""Cases that carry their templates as further channels, so that nnU-Net crops and moves both alike.

A template knows its place by the centre of the whole case (``transforms/placement.py``), which is lost once a patch is
cut, rotated and scaled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray
from nnssl_plugin.transforms.placement import cut_placed, on_case

Z_SCORE, TO_ONE = "ZScoreNormalization", "RescaleTo01Normalization"
"""The two normalisations of nnU-Net that each image is given by its own values."""
SMALLEST = 1e-8
"""Of a deviation or a range that is divided by; nnU-Net's."""


@dataclass(frozen=True)
class ChannelTemplates:
    """What stands in for each channel of a dataset; picklable, and shared by processes that receive it.

    A template is shown as it would come out of nnU-Net's preprocessing if it were the image of that channel: where each
    image is given mean 0 and deviation 1, so is the template on each case. This is what a file that
    ``nnssl_plugin fill`` wrote comes to at test time.
    """

    values: Tensor
    """(C, *grid), 0 where there is none."""
    known: tuple[bool, ...]
    """Channels of which there is a template."""
    normalisation: tuple[str, ...]
    """nnU-Net's, of each channel."""
    inside: tuple[bool, ...]
    """Channels that are normalised, and not 0, inside the mask of the case alone."""

    def scaling(self, case_shape: Sequence[int], segmentation) -> tuple[Tensor, Tensor]:
        """Factor and summand (C,) float32 that take the templates to a case's normalised intensities.

        Args:
            case_shape: size of the case in voxels.
            segmentation: (1, z, y, x), −1 outside the case's mask; array or blosc2 file, read where it is needed.
        """
        placed = on_case(self.values, case_shape)
        mask = torch.from_numpy(np.asarray(segmentation[:])[0] >= 0) if any(self.inside) else None
        pairs = [
            _scaling(template[mask] if inside else template, scheme)
            for template, scheme, inside in zip(placed, self.normalisation, self.inside, strict=True)
        ]
        return tuple(torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*pairs, strict=True))


def channel_templates(
    array: SpatialArray, channels: Sequence[str], normalisation: Sequence[str], inside: Sequence[bool]
) -> ChannelTemplates:
    """The templates of a dataset's channels, by their names; all channels may share one normalisation.

    Args:
        array: of the checkpoint, on the grid of the plan.
        channels: names in the dataset's order.
        normalisation: nnU-Net's, of each.
        inside: the plan's ``use_mask_for_norm``.
    """
    numbers = [array.number_of(channel) for channel in channels]
    values = torch.zeros(len(channels), *array.grid)
    for template, number in zip(values, numbers, strict=True):
        if number is not None:
            template.copy_(array.values[number])
    return ChannelTemplates(
        values.share_memory_(),
        tuple(number is not None for number in numbers),
        tuple(normalisation) * (len(channels) if len(normalisation) == 1 else 1),
        tuple(inside) * (len(channels) if len(inside) == 1 else 1),
    )


class TemplatedCase:
    """A case (2C, z, y, x), read when it is cut: the image's channels, then the template of each, 0 where none reaches.

    It offers what nnU-Net's ``crop_and_pad_nd`` needs of a file: a shape, and slicing.
    """

    def __init__(self, image, segmentation, templates: ChannelTemplates, scaling: tuple[Tensor, Tensor]):
        channels, *size = image.shape
        self.shape = (2 * channels, *size)
        self.dtype = np.dtype(np.float32)
        self._image, self._segmentation, self._templates, self._scaling = image, segmentation, templates, scaling

    def __getitem__(self, key: Any) -> np.ndarray:
        """All channels of a box of the case, whose first index is ``:``; slices have no step, numbers drop an axis."""
        key = key if isinstance(key, tuple) else (key,)
        if key[0] != slice(None):
            raise TypeError(f"only all channels of a case can be read together, not {key[0]}")
        key += (slice(None),) * (len(self.shape) - len(key))
        edges = [slice(k, k + 1) if isinstance(k, int | np.integer) else k for k in key[1:]]
        bounds = [each.indices(size)[:2] for each, size in zip(edges, self.shape[1:], strict=True)]
        box = tuple(slice(first, last) for first, last in bounds)
        both = np.concatenate((np.asarray(self._image[(slice(None), *box)], np.float32), self._cut(bounds, box)))
        return both[(slice(None), *(0 if isinstance(k, int | np.integer) else slice(None) for k in key[1:]))]

    def _cut(self, bounds: Sequence[tuple[int, int]], box: tuple[slice, ...]) -> np.ndarray:
        origin, extent = zip(*((first, last - first) for first, last in bounds), strict=True)
        templates, (factor, summand) = self._templates, self._scaling
        cut = cut_placed(templates.values, origin, extent, self.shape[1:])
        cut = cut * factor[:, None, None, None] + summand[:, None, None, None]
        if any(templates.inside):
            outside = np.asarray(self._segmentation[(slice(None), *box)])[0] < 0
            cut[torch.tensor(templates.inside)[:, None, None, None] & torch.from_numpy(outside)] = 0
        return cut.numpy()


class TemplatedDataset:
    """A dataset of nnU-Net whose cases carry their templates; everything else is the dataset's own. Picklable.

    Args:
        dataset: nnU-Net's, of either kind of file.
        templates: of the dataset's channels.
    """

    def __init__(self, dataset, templates: ChannelTemplates):
        self.dataset = dataset
        self.templates = templates
        self._scalings: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def identifiers(self) -> list[str]:
        """Names of the cases."""
        return self.dataset.identifiers

    def __getitem__(self, identifier: str):
        """As :meth:`load_case`."""
        return self.load_case(identifier)

    def load_case(self, identifier: str) -> tuple[TemplatedCase, Any, Any, Mapping[str, Any]]:
        """Image with templates, segmentation, that of a previous stage, and properties of a case."""
        image, segmentation, previous, properties = self.dataset.load_case(identifier)
        if identifier not in self._scalings:
            self._scalings[identifier] = self.templates.scaling(image.shape[1:], segmentation)
        case = TemplatedCase(image, segmentation, self.templates, self._scalings[identifier])
        return case, segmentation, previous, properties


def _scaling(values: Tensor, scheme: str) -> tuple[float, float]:
    """Factor and summand by which nnU-Net's normalisation of one image takes these values to their own."""
    if not values.numel():
        return 1.0, 0.0
    if scheme == Z_SCORE:
        deviation = max(float(values.std(correction=0)), SMALLEST)
        return 1 / deviation, -float(values.mean()) / deviation
    if scheme == TO_ONE:
        low, high = float(values.min()), float(values.max())
        width = max(high - low, SMALLEST)
        return 1 / width, -low / width
    return 1.0, 0.0
