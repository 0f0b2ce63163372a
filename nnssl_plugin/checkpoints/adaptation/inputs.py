"""What a network saw in pretraining against what it will see: normalisation, spacing, channels, orientation, axes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

SPACING_TOLERANCE = 0.25
"""Relative difference in spacing (mm) below which nothing is said."""
CT_TOLERANCE = 0.5
"""Difference in the normalised value of the same HU, in standard deviations, below which nothing is said."""
WINDOW = ("mean", "std", "percentile_00_5", "percentile_99_5")
"""What nnU-Net normalises a CT channel by."""
MEANING = {
    "CTNormalization": "one window in HU for all images",
    "ZScoreNormalization": "every image by its own mean and standard deviation",
    "NoNormalization": "values as stored",
    "RescaleTo01Normalization": "every image to [0, 1]",
    "RGBTo01Normalization": "0 to 255 becomes 0 to 1",
}
"""nnU-Net's normalisation → what it does."""
STATED = {
    "normalisation": "normalisation",
    "spacing_mm": "voxel spacing",
    "channels": "channels",
    "orientation": "orientation",
    "transpose_forward": "axis order",
}
"""Field of a provenance → what it is called."""


def compare_inputs(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """What the network will see otherwise than in pretraining, a line per difference.

    Args:
        source: ``provenance`` of the checkpoint (what ``provenance.describe_input`` gives); an empty one says nothing.
        target: ``provenance.describe_input`` of the target.
    """
    rules: dict[str, Callable[[Any, Any], str]] = {
        "normalisation": _normalisation,
        "spacing_mm": _spacing,
        "channels": _channels,
        "orientation": _orientation,
        "transpose_forward": _axes,
    }
    if _apart(source):
        rules["channels"] = partial(_channels_apart, source["network_channels"])
    lines = [rule(source[field], target[field]) for field, rule in rules.items() if source.get(field)]
    if source.get("native_spacing"):
        lines.append(f"the pretraining saw every case at its own spacing; here all have {target['spacing_mm']} mm")
    return [line for line in lines if line]


def compare_ct_windows(
    source: Mapping[str, Any] | None, target: Mapping[str, Any], schemes: Sequence[str]
) -> list[str]:
    """A line per CT channel in which the same HU gets clearly another value than in pretraining.

    Args:
        source: nnU-Net's plan of the pretraining; None is unknown.
        target: nnU-Net's plan of the target.
        schemes: normalisation of every channel, which is the same in both.
    """
    before, now = ((plan or {}).get("foreground_intensity_properties_per_channel") or {} for plan in (source, target))
    return [
        f"CT channel {channel} is normalised by another window: {_window(before[channel])} in pretraining, "
        f"{_window(now[channel])} here"
        for channel in map(str, range(len(schemes)))
        if schemes[int(channel)] == "CTNormalization"
        and all(set(WINDOW) <= set(values.get(channel, {})) for values in (before, now))
        and _windows_differ(before[channel], now[channel])
    ]


def unstated(source: Mapping[str, Any]) -> list[str]:
    """A line that names what the checkpoint does not say of its images; none where it says everything."""
    known = {"spacing_mm"} if source.get("native_spacing") else set()
    missing = [name for field, name in STATED.items() if not source.get(field) and field not in known]
    if not missing:
        return []
    return [f"the checkpoint does not say its {', '.join(missing)}: compare with its publication"]


def _normalisation(before: Sequence[str], now: Sequence[str]) -> str:
    if list(before) == list(now) or (len(before) != len(now) and set(before) == set(now)):
        return ""
    return f"intensities are normalised differently: {_explained(before)} in pretraining, {_explained(now)} here"


def _explained(schemes: Sequence[str]) -> str:
    known = [f"{scheme} ({MEANING[scheme]})" if scheme in MEANING else scheme for scheme in dict.fromkeys(schemes)]
    return ", ".join(known)


def _spacing(before: Sequence[float], now: Sequence[float]) -> str:
    if any(value is None for value in before):
        return ""
    axes = min(len(before), len(now))  # a 2D plan leaves out the first axis
    ratios = [b / a for a, b in zip(before[-axes:], now[-axes:], strict=True)]
    ratio = max(ratios, key=lambda r: max(r, 1 / r))
    if min(ratio, 1 / ratio) >= 1 - SPACING_TOLERANCE:
        return ""
    side = "coarser" if ratio > 1 else "finer"
    return (
        f"voxel spacing differs: {list(before)} in pretraining, {list(now)} here (mm; up to "
        f"{max(ratio, 1 / ratio):.1f} times {side})"
    )


def _channels(before: Sequence[str], now: Sequence[str]) -> str:
    old, new = ([str(name).casefold() for name in names] for names in (before, now))
    if old == new:
        return ""
    said = f"{list(before)} in pretraining, {list(now)} here"
    if sorted(old) == sorted(new):
        return f"channels stand in another order, and the first layer goes by their order: {said}"
    return f"channels differ: {said}"


def _apart(source: Mapping[str, Any]) -> bool:
    """Whether the network read another number of channels than its dataset has."""
    read = source.get("network_channels")
    return read is not None and read != len(source.get("channels") or ())


def _channels_apart(read: int, before: Sequence[str], now: Sequence[str]) -> str:
    return (
        f"the network read {read} channel{'' if read == 1 else 's'} in pretraining, made of {list(before)}, and reads "
        f"{list(now)} here"
    )


def _orientation(before: str, now: str) -> str:
    return "" if before == now else f"images are oriented differently: {before} in pretraining, {now} here"


def _axes(before: Sequence[int], now: Sequence[int]) -> str:
    if list(before) == list(now):
        return ""
    return f"axes are transposed differently: {list(before)} in pretraining, {list(now)} here"


def _windows_differ(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether a HU within both windows gets values that differ by more than the tolerance, or there is none."""
    low, high = (choose(before[key], now[key]) for choose, key in ((max, "percentile_00_5"), (min, "percentile_99_5")))
    if low >= high:
        return True
    return any(
        abs((hu - before["mean"]) / before["std"] - (hu - now["mean"]) / now["std"]) > CT_TOLERANCE
        for hu in (low, high)
    )


def _window(values: Mapping[str, float]) -> str:
    return (
        f"[{values['percentile_00_5']:.0f}, {values['percentile_99_5']:.0f}] HU, mean {values['mean']:.0f}, "
        f"standard deviation {values['std']:.0f}"
    )
