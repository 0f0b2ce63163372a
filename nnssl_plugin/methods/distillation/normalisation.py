"""Intensities as the teacher knows them, from those that the student's plan made of the same voxels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl_plugin.checkpoints.sources.source import Source
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.plans import resolve_configuration

ZSCORE, CT = "ZScoreNormalization", "CTNormalization"
INTENSITIES = "foreground_intensity_properties_per_channel"
WINDOW = ("mean", "std", "percentile_00_5", "percentile_99_5")
"""What nnU-Net normalises a CT channel by, in HU."""
Rule = Callable[[Tensor, Tensor], Tensor]
"""One channel (B, 1, *spatial) and which of its voxels lie in the case (B, 1, *spatial) → the channel."""


def for_teacher(image: Tensor, inside: Tensor, rules: Sequence[Rule]) -> Tensor:
    """The image (B, C, *spatial) with the rule of each channel applied; 0 outside the case.

    Args:
        image: (B, C, *spatial), the plan's normalised intensities.
        inside: (B, C, *spatial) bool, voxels that lie in the case, of channels that it has.
        rules: one for each channel.
    """
    known = inside.split(1, 1)
    channels = [rule(channel, in_it) for rule, channel, in_it in zip(rules, image.split(1, 1), known, strict=True)]
    return torch.where(inside, torch.cat(channels, 1), 0.0)


def unchanged(channel: Tensor, inside: Tensor) -> Tensor:
    """The plan's own normalisation."""
    return channel


def standardised(channel: Tensor, inside: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the voxels of the window that lie in the case: the nearest to a z-score over
    the case, which a window does not know. A constant becomes 0."""
    axes = tuple(range(1, channel.ndim))
    number = inside.sum(axes, keepdim=True).clamp(min=1)
    mean = torch.where(inside, channel, 0.0).sum(axes, keepdim=True) / number
    apart = torch.where(inside, channel - mean, 0.0)
    return apart / (apart.square().sum(axes, keepdim=True) / number).sqrt().clamp(min=1e-8)  # nnU-Net's bound


@dataclass(frozen=True)
class OtherWindow:
    """CT that was clipped and standardised by one window in HU, as by another; what the first clipped stays clipped."""

    before: Mapping[str, float]
    now: Mapping[str, float]

    def __call__(self, channel: Tensor, inside: Tensor) -> Tensor:
        """The channel, from the values of one window to those of the other."""
        hu = channel * self.before["std"] + self.before["mean"]
        clipped = hu.clamp(self.now["percentile_00_5"], self.now["percentile_99_5"])
        return (clipped - self.now["mean"]) / self.now["std"]


def rules_for(
    source: Source, normalisation: str, plans: Mapping[str, Any], configuration: str, channels: int
) -> list[Rule]:
    """The rule of each channel of the plan; a teacher of one channel knows all by its own.

    Args:
        source: the teacher's file, of one channel or as many as the plan.
        normalisation: the setting: ``file``, ``plan`` or ``zscore``.
        plans, configuration: of the student.
        channels: of the plan.

    Raises:
        UserError: when the file does not say how its images were normalised, or the plan's values cannot be brought
            there.
    """
    if normalisation == "plan":
        return [unchanged] * channels
    own = [0 if source.input_channels == 1 else channel for channel in range(channels)]
    return [_rule(source, normalisation, plans, configuration, here, there) for here, there in enumerate(own)]


def _rule(
    source: Source, normalisation: str, plans: Mapping[str, Any], configuration: str, channel: int, own: int
) -> Rule:
    """The rule of a channel of the plan that is the teacher's channel ``own``."""
    here = _scheme(plans, configuration, channel)
    there = (ZSCORE, False) if normalisation == "zscore" else _stated_scheme(source, own)
    if here[0] == there[0] == CT:
        before, now = _window(plans, channel), _window(source.plans, own)
        return OtherWindow(before, now) if before and now else unchanged
    if there == here:  # a z-score over all voxels of the case is the plan's already
        return unchanged
    if there[0] == ZSCORE:
        return standardised
    raise UserError(
        f"The teacher {source.path.name} knows channel {channel} by {there[0]}, the plan normalises it by {here[0]}, "
        "from which that cannot be had.",
        "Give the plan the teacher's normalisation and preprocess again (nnssl_plugin plan -d ID -n NAME --set "
        f"'configurations.{configuration}.normalization_schemes=[\"{there[0]}\"]'), or let the teacher see the plan's "
        "values: --set method.normalisation=plan",
    )


def _scheme(plans: Mapping[str, Any], configuration: str, channel: int) -> tuple[str, bool]:
    """Normalisation of a channel, and whether it looks at the voxels of a mask alone."""
    resolved = resolve_configuration(plans, configuration)
    schemes, masks = resolved["normalization_schemes"], resolved["use_mask_for_norm"]
    return schemes[min(channel, len(schemes) - 1)], bool(masks[min(channel, len(masks) - 1)])


def _window(plans: Mapping[str, Any] | None, channel: int) -> Mapping[str, float] | None:
    """What a plan normalises a CT channel by; ``None`` where that is not known."""
    window = (plans or {}).get(INTENSITIES, {}).get(str(channel), {})
    return window if set(WINDOW) <= set(window) else None


def _stated_scheme(source: Source, channel: int) -> tuple[str, bool]:
    if source.plans is not None and source.configuration is not None:
        return _scheme(source.plans, source.configuration, channel)
    stated = source.provenance.get("normalisation")
    if not stated:
        raise UserError(
            f"The teacher {source.path.name} does not say how its images were normalised.",
            "See its publication, and name it: nnssl_plugin plan -d ID -p PLANS -n NAME --set "
            "method.normalisation=zscore (or plan, for the values of the plan)",
        )
    return stated[min(channel, len(stated) - 1)], False
