"""The alignment that a training has learned, out of its checkpoint: volumes in the space of the texts."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.med3dinsight.psat import PlaneSliceAwareTransformer
from nnssl_plugin.methods.med3dinsight.settings import Settings
from nnssl_plugin.nnunet.planes import PLANES

POSITIONS = 4
"""Places along an axis that the embedding of a volume is the mean of."""
PREFIX = "psat."


class Alignment:
    """The plane-slice-aware transformer and the metric of a training, frozen.

    A text does not say where in a volume to look, so the embedding of a volume is the mean over its three planes and
    :data:`POSITIONS` places in the middle half of each, where the training showed slices.

    Args:
        psat: with its weights.
        metric: M (E, E) of the distance between volumes and texts.
        settings: of the training.
    """

    def __init__(self, psat: PlaneSliceAwareTransformer, metric: Tensor, settings: Settings):
        self.psat = psat.eval().requires_grad_(False)
        self.metric: np.ndarray = metric.double().cpu().numpy()
        self.centre = settings.centre
        self.whole = settings.field_of_view == "resize"

    @property
    def dimensions(self) -> int:
        """Length E of an embedding."""
        return len(self.metric)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All that was learned, for its hash."""
        return {**self.psat.state_dict(), "metric": torch.from_numpy(self.metric)}

    @torch.no_grad()
    def embed(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Volumes by their tokens (B, L, C) on a grid, (B, E) float32: means of unit vectors."""
        self.psat.to(tokens.device)
        positions = 0.25 + (torch.arange(POSITIONS, device=tokens.device) + 0.5) / (2 * POSITIONS)
        places = [(plane, position) for plane in range(len(PLANES)) for position in positions]
        return torch.stack([self._at(tokens, grid, plane, position) for plane, position in places]).mean(0)

    def _at(self, tokens: Tensor, grid: Sequence[int], plane: int, position: Tensor) -> Tensor:
        planes = torch.full((len(tokens),), plane, device=tokens.device)
        return self.psat(tokens, grid, planes, position.expand(len(tokens)))


def load_alignment(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Alignment:
    """The alignment of a checkpoint.

    Args:
        state: of the task, ``ssl_state["task"]``.
        settings: of the method, as the provenance has them.

    Raises:
        UserError: the state does not hold it.
    """
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if not own or "metric" not in state:
        raise UserError(
            "The checkpoint holds the network alone, not the alignment of volumes with texts.",
            "Use the checkpoint that the training itself wrote, or a folder that export made of it.",
        )
    known = Settings(**{field.name: settings[field.name] for field in fields(Settings) if field.name in settings})
    psat = PlaneSliceAwareTransformer(
        own["project_tokens.weight"].shape[1],
        len(state["metric"]),
        dim=known.dim,
        queries=known.queries,
        layers=known.layers,
        heads=known.heads,
        mlp_ratio=known.mlp_ratio,
        slice_bins=known.slice_bins,
        output=known.output,
    )
    psat.load_state_dict(own)
    return Alignment(psat, state["metric"], known)
