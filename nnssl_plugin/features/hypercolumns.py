"""The encoder's maps of whole cases, read at voxels, in windows and slabs that keep memory flat."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from nnssl_plugin.data.windows import covering_origins, read_window
from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone

WINDOW_VOXELS = 2**19
"""Voxels that are encoded at once: several windows where they are small."""
SLAB_VALUES = 2**24
"""Values at voxels that are held at once."""


@dataclass(frozen=True)
class Maps:
    """Encoder maps of some windows of a case."""

    features: list[Tensor]
    """(B, channels[s], *spatial / strides[s]), fine to coarse."""
    boxes: list[tuple[slice, ...]]
    """Of each window the voxels of the case (z, y, x) that it shows."""
    inner: list[tuple[slice, ...]]
    """Where these lie in the window, on the window's axes."""


@torch.no_grad()
def encoded(backbone: Backbone, data, patch: Sequence[int], *, device: torch.device, case: str) -> Iterator[Maps]:
    """Encode a case (C, z, y, x) in windows that cover it, side by side as nnU-Net's sliding window without overlap.

    Raises:
        UserError: the image or a map holds values that are not finite.
    """
    shape = data.shape[1:]
    window = (1,) * (3 - len(patch)) + tuple(patch)
    origins = covering_origins(shape, window)
    together = max(1, WINDOW_VOXELS // int(np.prod(patch)))
    for start in range(0, len(origins), together):
        chosen = origins[start : start + together]
        images = np.stack([read_window(data, origin, window) for origin in chosen])
        if not np.isfinite(images).all():
            raise UserError(f"Case {case} holds voxels that are NaN or infinite.", "Preprocess it again, or leave it.")
        x = torch.from_numpy(images.reshape(*images.shape[:2], *patch)).to(device)
        features = [maps.float() for maps in backbone.features(x)]
        if not all(bool(maps.isfinite().all()) for maps in features):
            raise UserError(
                f"The network gives values for case {case} that are NaN or infinite.",
                "See whether the weights are sound: nnssl_plugin inspect CHECKPOINT",
            )
        low, high = np.maximum(chosen, 0), np.minimum(chosen + window, shape)
        boxes = [tuple(map(slice, a, b)) for a, b in zip(low, high, strict=True)]
        inner = [tuple(map(slice, a, b))[-len(patch) :] for a, b in zip(low - chosen, high - chosen, strict=True)]
        yield Maps(features, boxes, inner)


def hypercolumns(backbone: Backbone, features: Sequence[Tensor], window: int, voxels: Tensor) -> Tensor:
    """All maps of one window side by side at some voxels (P, D), linear between tokens, constant beyond the outermost.

    Args:
        backbone: says where the tokens of each stage lie.
        features: maps (B, channels[s], *grid).
        window: which of the B.
        voxels: (P, d) coordinates in the window.
    """
    columns = []
    for stage, maps in enumerate(features):
        grid = backbone.stage_grid(stage, maps.shape[2:])
        offset, spacing, counts = (maps.new_tensor(each) for each in (grid.offset, grid.spacing, grid.counts))
        place = 2 * (voxels - offset) / spacing / (counts - 1).clamp(min=1) - 1  # -1 the first token, 1 the last
        points = place.flip(1).reshape(1, -1, *[1] * (voxels.shape[1] - 1), voxels.shape[1])  # x comes first
        read = grid_sample(maps[window : window + 1], points, padding_mode="border", align_corners=True)
        columns.append(read[0].flatten(1).mT)
    return torch.cat(columns, 1)


def slabs(backbone: Backbone, features: Sequence[Tensor], patch: Sequence[int]) -> Iterator[tuple[slice, list[Tensor]]]:
    """All maps read at the voxels of a few rows of the window's first axis at a time, linear between tokens.

    Args:
        backbone: says where the tokens of each stage lie.
        features: maps (B, C_s, *grid) of each stage, whatever their channels.
        patch: size of the window in voxels.

    Yields:
        the rows, and for each stage (B, C_s, rows, *patch[1:]).
    """
    grids = [backbone.stage_grid(stage, maps.shape[2:]) for stage, maps in enumerate(features)]
    axes = [torch.arange(size, device=features[0].device, dtype=torch.float32)[None] for size in patch]
    per_row = sum(len(maps) * maps.shape[1] for maps in features) * int(np.prod(patch[1:]))
    height = max(1, SLAB_VALUES // per_row)
    for start in range(0, patch[0], height):
        rows = slice(start, min(patch[0], start + height))
        points = [axes[0][:, rows], *axes[1:]]
        yield rows, [grid.read(maps, points) for grid, maps in zip(grids, features, strict=True)]
