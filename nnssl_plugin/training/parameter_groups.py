"""Learning rates that fall from the deep stages of a network to the shallow ones, for pretraining and fine-tuning."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from nnssl_plugin.networks.family import Parts

Group = dict[str, Any]
"""A group of an optimiser: ``params``, and what else says how they move (``lr_scale``, ``frozen_until``: see
``schedules``)."""


def stage_scales(stages: int, layer_decay: float) -> list[float]:
    """Factors of the rate of each encoder stage, shallow to deep: ``layer_decay ** n`` for the first of n stages,
    ``layer_decay`` for the deepest (Clark et al. 2020, ELECTRA, appendix A; Bao et al. 2022, BEiT)."""
    return [layer_decay ** (stages - number) for number in range(stages)]


def scaled_by_stage(groups: Sequence[Group], parts: Parts, layer_decay: float) -> list[Group]:
    """The groups, each split by the stages that its parameters belong to; what belongs to none keeps its rate.

    Args:
        groups: of the whole task; their other entries are kept in every part.
        parts: of the network.
        layer_decay: factor of the rate from a stage to the next shallower one, in (0, 1].

    Returns:
        new groups in the order of the old ones, the parts of each by falling rate.
    """
    if layer_decay == 1:
        return list(groups)
    scales = stage_scales(len(parts.stages), layer_decay)
    scale_of = {id(p): scale for scale, stage in zip(scales, parts.stages, strict=True) for p in stage}
    result = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_scale[scale_of.get(id(parameter), 1.0)].append(parameter)
        result += [
            {**group, "params": by_scale[scale], "lr_scale": scale * group.get("lr_scale", 1.0)}
            for scale in sorted(by_scale, reverse=True)
        ]
    return result
