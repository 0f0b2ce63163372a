"""A checkpoint's spatial arrays on the grid of a target plan: its spacing, and its axes in its order."""

from collections.abc import Mapping
from typing import Any

from nnssl_plugin.checkpoints.format.provenance import describe_input
from nnssl_plugin.checkpoints.format.spatial_arrays import KNOWN_AXES, SpatialArray, resampled
from nnssl_plugin.nnunet.planes import grid_axes


def fit_arrays(
    arrays: Mapping[str, SpatialArray],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> tuple[dict[str, SpatialArray], list[str]]:
    """The arrays as the target's preprocessed cases need them, and what is to be said of each.

    Intensities stay those of the pretraining: under a normalisation by each image's own mean and deviation there is no
    way back to another one. For a 2D configuration, whose cases keep their own spacing between slices, it is the
    dataset's median one.

    Args:
        arrays: of the checkpoint.
        plans: the target's plan.
        configuration: one of its configurations.
        dataset_json: of the target.
    """
    here = describe_input(plans, configuration, dataset_json)
    spacing = here["spacing_mm"]
    if len(spacing) == 2:
        spacing = [float(plans["original_median_spacing_after_transp"][0]), *spacing]
    fitted = {name: resampled(array, spacing_mm=spacing, axes=grid_axes(plans)) for name, array in arrays.items()}
    lines = []
    for name, array in arrays.items():
        lines.append(f"array {name} carried: {fitted[name].said()}")
        lines += [f"array {name}: {line}" for line in _differences(array, fitted[name].axes, here)]
    return fitted, lines


def _differences(array: SpatialArray, axes: tuple[str, ...], here: Mapping[str, Any]) -> list[str]:
    """Where names, intensities or axes of an array are not those of the target."""
    channels, schemes = here["channels"], here["normalisation"]
    schemes = schemes * len(channels) if len(schemes) == 1 else schemes
    lines = []
    absent = [channel for channel in channels if array.number_of(channel) is None]
    if absent:
        lines.append(f"has nothing for the channel {', '.join(absent)}")
    for channel, scheme in zip(channels, schemes, strict=False):
        number = array.number_of(channel)
        if number is not None and array.normalisation[number] != scheme:
            lines.append(f"{channel} is in {array.normalisation[number]}, its channel here in {scheme}")
    if set(array.axes) != set(axes):
        known = "pretraining" if set(array.axes) == set(KNOWN_AXES) else "the target"
        lines.append(f"the orientation of images is known in {known} alone: compare a picture of both")
    return lines
