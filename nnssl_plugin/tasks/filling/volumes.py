"""The volume that stands in for a channel on the grid of a case's files, such that nnU-Net's preprocessing finds it.

nnU-Net crops a case to what is not zero in every channel, normalises each channel, and resamples. The stand-in is laid
on the crop of the channels that are there, centre on centre, taken back from normalised intensities, and zero outside
their mask where a normalisation reads it: neither crop nor mask change for the others. After preprocessing its values
are

* exactly those of the stand-in under ``NoNormalization``, and under ``CTNormalization`` and ``RGBTo01Normalization``
  within the bounds to which they clip, when the case has the plan's spacing;
* those of the stand-in with mean 0 and deviation 1 on this case under ``ZScoreNormalization``, and in [0, 1] under
  ``RescaleTo01Normalization``: these forget level and scale of any image, so nothing in a file can give them back;
* else up to the interpolation there and back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnssl_plugin.transforms.placement import on_case


def stand_in_volume(
    values: Tensor,
    present: np.ndarray,
    spacing_mm: Sequence[float],
    channel: int,
    *,
    plans: PlansManager,
    configuration: ConfigurationManager,
) -> np.ndarray:
    """The volume (x, y, z as the reader has them) float32 of a channel that a case lacks.

    Args:
        values: (*grid) of the stand-in, on the plan's grid and in its normalised intensities.
        present: (C, …) of nnU-Net's reader, the channels that the case has, one at least.
        spacing_mm: of the reader's array.
        channel: number of the absent one.
        plans: of the model.
        configuration: of the model.
    """
    forward = plans.transpose_forward
    mask = create_nonzero_mask(present.transpose(0, *(axis + 1 for axis in forward)))
    box = bounding_box_to_slice(get_bbox_from_mask(mask))
    inside = mask[box]
    own = [spacing_mm[axis] for axis in forward]
    target = [*own[: 3 - len(configuration.spacing)], *configuration.spacing]
    placed = on_case(values, [int(size) for size in compute_new_shape(inside.shape, own, target)]).numpy()
    raw = before_normalisation(
        placed,
        _of_channel(configuration.normalization_schemes, channel),
        plans.foreground_intensity_properties_per_channel.get(str(channel), {}),
    )
    raw = np.asarray(configuration.resampling_fn_data(raw[None], inside.shape, target, own))[0]
    volume = np.zeros(mask.shape, np.float32)
    volume[box] = np.where(inside, raw, 0) if any(configuration.use_mask_for_norm) else raw
    return volume.transpose(plans.transpose_backward)


def before_normalisation(values: np.ndarray, scheme: str, intensities: Mapping[str, Any]) -> np.ndarray:
    """What nnU-Net's normalisation takes to ``values``, or to what it makes of their shape alone.

    Args:
        values: normalised.
        scheme: name of nnU-Net's class.
        intensities: of the channel in the plan, for ``CTNormalization``.
    """
    if scheme == "CTNormalization":
        return (values * intensities["std"] + intensities["mean"]).astype(np.float32)
    if scheme == "RGBTo01Normalization":
        return np.clip(values * 255, 0, 255).astype(np.float32)
    return values.astype(np.float32)


def _of_channel(schemes: Sequence[str], channel: int) -> str:
    return schemes[channel if len(schemes) > 1 else 0]
