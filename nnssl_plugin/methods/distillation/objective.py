"""Distillation of maps: the planned network learns to see in a volume what a frozen one sees.

Romero et al., "FitNets: Hints for Thin Deep Nets", section 2.2: a regressor brings the student's hidden map to the
teacher's width, and the two are compared (Eq. 3, there by a squared norm). Here the regressor is linear and the
comparison the cosine of each token, whose scale a foundation model does not fix.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch
from nnssl_plugin.methods.distillation.normalisation import Rule, for_teacher
from nnssl_plugin.methods.distillation.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views
from nnssl_plugin.training.pictures import Overlay
from nnssl_plugin.transforms.masks import inside_case


class Distillation(PretextTask):
    """The pretext task.

    The teacher is no part of the task's state: neither checkpoints nor other ranks get its weights, no change of the
    task's mode reaches it, and whoever moves the task moves it too.

    Args:
        backbone: the planned network; its encoder is trained.
        settings: :class:`Settings`.
        teacher: a frozen network in test mode, on the device of the task.
        rules: from the plan's normalisation to the teacher's, one for each channel of the plan.
    """

    trained_parts = ("encoder",)

    def __init__(self, backbone: Backbone, settings: Settings, *, teacher: Backbone, rules: Sequence[Rule]):
        super().__init__(backbone, settings)
        self._teacher = (teacher,)  # a module in a tuple is not registered
        self.rules = list(rules)
        self.teacher_stage = nearest_stage(teacher, [settings.stride] * teacher.dimensions)
        self.stage = nearest_stage(backbone, teacher.strides[self.teacher_stage])
        self.projection = nn.Linear(backbone.channels[self.stage], teacher.channels[self.teacher_stage])

    @property
    def teacher(self) -> Backbone:
        """The frozen network."""
        return self._teacher[0]

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """The image, the same voxels as the teacher knows them, and which voxels lie in the case."""
        image, available = batch["image"], batch["available"]
        inside = inside_case(batch["origin"], batch["case_shape"], tuple(image.shape[2:]))
        known = inside & available.reshape(*available.shape, *[1] * (image.ndim - 2))
        seen = for_teacher(image, known, self.rules)
        if self.teacher.input_channels < image.shape[1]:  # a teacher of one channel sees the first that the case has
            seen = seen.take_along_dim(available.int().argmax(1).reshape(-1, *[1] * (image.ndim - 1)), 1)
        return {"image": image, "seen": seen, "inside": inside}

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """Losses (B,) over the tokens of the teacher whose cells hold a voxel of the case: ``cosine``, the mean of
        1 − cosine, and ``values``, the mean square between standardised values."""
        predicted, target, counted = self.tokens(views)
        return {}, {
            "cosine": _mean(1 - F.cosine_similarity(predicted, target, dim=2), counted),
            "values": _mean((_standard(predicted, counted) - _standard(target, counted)).square().mean(2), counted),
        }

    def tokens(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """The student's projected tokens and the teacher's (B, N, C) on the teacher's grid, and which count (B, N)."""
        with torch.no_grad():
            target = self.teacher.features(views["seen"])[self.teacher_stage]
        map_ = self.backbone.features(views["image"])[self.stage]
        grid = self.teacher.stage_grid(self.teacher_stage, target.shape[2:])
        own = self.backbone.stage_grid(self.stage, map_.shape[2:])
        read = own.read(map_, [axis[None] for axis in grid.axes(map_.device)])
        predicted = self.projection(read.flatten(2).mT.to(map_.dtype))
        counted = grid.sums(views["inside"])[:, 0] > 0
        return predicted.to(read.dtype), target.flatten(2).mT.to(read.dtype), counted

    def weights(self, progress: float) -> dict[str, float]:
        """As set: 1 for the cosine and 0 for the values."""
        return {"cosine": self.settings.cosine_weight, "values": self.settings.values_weight}

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """``cosine`` of a student that says the teacher's mean token everywhere: the control; and the mean projected
        token of each case."""
        predicted, target, counted = self.tokens(views)
        number = counted.sum().clamp(min=1)
        mean = torch.where(counted[..., None], target, 0.0).sum((0, 1)) / number
        constant = _mean(1 - F.cosine_similarity(mean.expand_as(target), target, dim=2), counted)
        return {"constant_cosine": constant.mean(), "features": _mean(predicted, counted)}

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list]:
        """The first sample, and over it the cosine of each token with the teacher's."""
        first = {name: view[:1] for name, view in views.items()}
        predicted, target, _ = self.tokens(first)
        image = first["seen"][0, 0].float()
        size = tuple(image.shape)
        counts = self.teacher.features(first["seen"])[self.teacher_stage].shape[2:]
        grid = self.teacher.stage_grid(self.teacher_stage, counts)
        cosine = F.cosine_similarity(predicted, target, dim=2)[0].reshape(tuple(counts))
        agreement = Overlay(image, values=grid.over(cosine, size).float())
        return {"agreement": [("volume", image), ("cosine", agreement)]}


def nearest_stage(backbone: Backbone, stride: Sequence[float]) -> int:
    """Index of the stage whose stride differs least, in its logarithm over all axes; of equal ones the finer."""
    distance = [
        sum(abs(math.log(own / wanted)) for own, wanted in zip(strides, stride, strict=True))
        for strides in backbone.strides
    ]
    return distance.index(min(distance))


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean (B, …) over the tokens (B, N, …) that count; 0 where none does."""
    weights = counted.reshape(*counted.shape, *[1] * (values.ndim - 2))
    return torch.where(weights, values, 0.0).sum(1) / counted.sum(1).clamp(min=1).reshape(-1, *[1] * (values.ndim - 2))


def _standard(tokens: Tensor, counted: Tensor) -> Tensor:
    """Each channel of (B, N, C) with mean 0 and standard deviation 1 over the tokens of its sample that count: over the
    channels of each token instead, the mean square would be the cosine again."""
    apart = tokens - _mean(tokens, counted)[:, None]
    return apart / (_mean(apart.square(), counted) + 1e-6).sqrt()[:, None]
