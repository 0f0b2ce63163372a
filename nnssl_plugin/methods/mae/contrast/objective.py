"""MAE with aligned contrast: two crops of a case are restored, and the points that both show must be told apart alike.

Vaish et al., "Consistent View Alignment Improves Foundation Models for 3D Medical Image Segmentation", which won the
SSL3D challenge, gave the idea; what it compares and how is written here from it, not from its code.
L = L_MAE + w · NT-Xent (Chen et al., SimCLR, Eq. 1).
"""

import math
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.methods.mae.contrast.settings import Settings
from nnssl_plugin.methods.mae.contrast.views import crop_at, draw_starts, largest_shifts, lattice, row_of, shared_points
from nnssl_plugin.methods.mae.objective import MAE
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.contrastive import nt_xent
from nnssl_plugin.pretraining.pretext import Terms, Views
from nnssl_plugin.transforms.masks import inside_case

CROPS = ("first", "second")
"""What stands before the names of the views of each crop."""


class MAEContrast(MAE):
    """The pretext task.

    The points are read from what the decoder reads: the encoder's maps; of a transformer, which encodes the visible
    patches alone, the grid that its light decoder has filled, as most points lie between masked patches and a pass over
    all patches would cost what MAE saves.

    Args:
        backbone: the planned network; encoder and decoder are trained.
        settings: :class:`Settings`.
        patch_size: of the plan in voxels, the size of a crop.
    """

    def __init__(self, backbone: Backbone, settings: Settings, *, patch_size: Sequence[int]):
        super().__init__(backbone, settings)
        self.size = tuple(patch_size)
        self.needs = Needs(margin=2 - settings.overlap)
        self.stage = contrast_stage(backbone, self.size, settings.cells)
        stride = backbone.strides[self.stage]
        counts = [length // step for length, step in zip(self.size, stride, strict=True)]
        self.grid = backbone.stage_grid(self.stage, counts)
        width = backbone.channels[self.stage]
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, settings.dim))

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """MAE's views of both crops; where their common points lie, in voxels of each crop (B, d, K), and in the case
        (B, K^d, d), in tokens; a number (B,) for each case."""
        window, origin = tuple(batch["image"].shape[2:]), batch["origin"]
        shifts = largest_shifts(self.size, self.settings.overlap, self.grid)
        placed = {"window": window, "size": self.size, "shifts": shifts, "generator": generator}
        starts = draw_starts(origin, batch["case_shape"], **placed)
        inside = inside_case(origin, batch["case_shape"], window)
        points = shared_points(starts, self.grid, self.settings.points)
        views = {}
        for name, start in zip(CROPS, starts, strict=True):
            image, known = (crop_at(volume, start, self.size) for volume in (batch["image"], inside))
            masked = self.masked_views(image, known, batch["available"], generator)
            views |= {f"{name}_{key}": view for key, view in masked.items()}
            views[f"{name}_points"] = points - start[..., None]
        views["points"] = (lattice(points) + origin[:, None]) / row_of(self.grid.spacing, origin)
        numbers = torch.tensor([zlib.crc32(name.encode()) for name in batch["cases"]])
        views["case"] = numbers.to(origin.device, non_blocking=True)
        return views

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """Features (B, K^d, dim) of length 1 at the points of each crop; ``reconstruction`` (B,), mean of both."""
        both = _together(views)
        maps = self.maps(both)
        first, second = self._projected(maps, both["points"]).chunk(2)
        outputs = {"first": first, "second": second, "points": views["points"], "case": views["case"]}
        error = self.error(self.restored(maps, both), both)
        return outputs, {"reconstruction": error.unflatten(0, (2, -1)).mean(0)}

    def loss(self, outputs: Views, progress: float) -> Terms:
        """``contrast``: NT-Xent over the points of all ranks."""
        first, second = (outputs[name].flatten(0, 1) for name in CROPS)
        temperature = self.temperature(progress)
        return {"contrast": nt_xent(first, second, temperature=temperature, apart=negatives(outputs))}

    def temperature(self, progress: float) -> float:
        """τ at a fraction of the run: from the early one, linearly, to the final one."""
        chosen = self.settings
        fading = (chosen.settled_from - progress) / max(chosen.settled_from - chosen.contrast_from, 1e-9)
        return chosen.temperature + (chosen.early_temperature - chosen.temperature) * min(max(fading, 0.0), 1.0)

    def weights(self, progress: float) -> dict[str, float]:
        """0 for the contrast until it sets in."""
        return {"contrast": self.settings.contrast_weight if progress >= self.settings.contrast_from else 0.0}

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Those of MAE over both crops; the cosine of equal points, the share of points of the first crop that are
        found among the negatives of the second, and the chance of that; the mean feature of each case."""
        outputs, _ = self.encode(views)
        first, second = (outputs[name].flatten(0, 1) for name in CROPS)
        others = negatives(outputs).fill_diagonal_(False)
        similarity = (first @ second.T).masked_fill(~others.clone().fill_diagonal_(True), -math.inf)
        found = similarity.argmax(1) == torch.arange(len(first), device=first.device)
        return super().diagnostics(_together(views)) | {
            "positive_cosine": (first * second).sum(1).mean(),
            "point_retrieval": found.float().mean(),
            "point_retrieval_chance": (1 / (1 + others.sum(1))).mean(),
            "features": outputs["first"].mean(1),
        }

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list]:
        """MAE's, of the first crop."""
        return super().pictures({name.removeprefix("first_"): v for name, v in views.items() if name[:6] == "first_"})

    def _projected(self, maps: list[Tensor], points: Tensor) -> Tensor:
        """Features (B, K^d, dim) at the points (B, d, K) of each crop."""
        map_ = maps[self.stage - len(self.backbone.strides)]  # counted from the coarsest, which a transformer has alone
        read = self.grid.read(map_, points.unbind(1)).flatten(2).mT
        return F.normalize(self.projector(read.to(map_.dtype)).to(read.dtype), dim=-1)


def contrast_stage(backbone: Backbone, size: Sequence[int], cells: int) -> int:
    """Index of the coarsest stage with at least so many tokens on every axis; the finest where there is none.

    Stages of stride 1 do not count: in some networks they are the image itself, of which nothing was learned.
    """
    stages = [stage for stage, stride in enumerate(backbone.strides) if max(stride) > 1] or [0]
    fitting = [
        stage
        for stage in stages
        if all(length // step >= cells for length, step in zip(size, backbone.strides[stage], strict=True))
    ]
    return fitting[-1] if fitting else stages[0]


def negatives(outputs: Views) -> Tensor:
    """Which points (N, N) count as different: those of different cases, and of one case more than a token apart, along
    some axis, wherever the case was cut."""
    points = outputs["points"].detach()
    case = outputs["case"].repeat_interleave(points.shape[1])
    distance = torch.cdist(points.flatten(0, 1), points.flatten(0, 1), p=math.inf)
    return (case[:, None] != case) | (distance > 1)


def _together(views: Views) -> Views:
    """The views of both crops as those of 2B samples."""
    names = [name.removeprefix("first_") for name in views if name.startswith("first_")]
    return {name: torch.cat([views[f"{crop}_{name}"] for crop in CROPS]) for name in names}
