"""M3Ret's SimDINO: views of an image agree, and the coding rate keeps their features apart.

Liu et al., M3Ret, section 3.3 and appendix B; Wu et al., "Simplifying DINO via Coding Rate Regularization".
"""

import math

import torch
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.methods.m3ret.inputs import VIDEO, as_volume, unified
from nnssl_plugin.methods.m3ret.simdino.heads import Projection
from nnssl_plugin.methods.m3ret.simdino.settings import Settings
from nnssl_plugin.methods.m3ret.simdino.views import global_views, local_views
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.teacher import Teacher
from nnssl_plugin.objectives.coding_rate import coding_rate, official_weight
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views


class SimDINO(PretextTask):
    """The pretext task.

    Args:
        backbone: the planned network; its encoder is trained. A network with a summary token is compared by it, any
            other by the mean and the maximum of its coarsest map.
        settings: :class:`Settings`.
        channels: that every image gets; ``None`` for those of the one dataset.
    """

    needs = Needs(window="fit", unifies=True)
    trained_parts = ("encoder",)

    def __init__(self, backbone: Backbone, settings: Settings, *, channels: int | None = None):
        super().__init__(backbone, settings)
        self.channels = channels
        self.head = Projection(_width(backbone), settings.hidden, settings.width)
        self.teacher = nn.ModuleDict(
            {name: Teacher(part, settings.momentum) for name, part in (("backbone", backbone), ("head", self.head))}
        )

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """``global`` (B, 2, C, *size) and ``local`` (B, L, C, *smaller) views of each image."""
        image, video = unified(batch, self.settings, self.channels, generator), batch.get("kind") == VIDEO
        strides = self.backbone.strides[-1]
        views = {"global": global_views(image, self.settings, video=video, generator=generator)}
        local = local_views(image, self.settings, strides, video=video, generator=generator)
        return views if local is None else views | {"local": local}

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """``student`` (B, 2 + L, d) and ``teacher`` (B, 2, d): the projected features of all views, of length 1."""
        student = [self._project(self.backbone, self.head, view) for view in views.values()]
        with torch.no_grad():
            teacher = self._project(self.teacher["backbone"].module, self.teacher["head"].module, views["global"])
        return {"student": torch.cat(student, 1), "teacher": teacher}, {}

    def loss(self, outputs: Views, progress: float) -> Terms:
        """Alignment of the views, and γ times the coding rate of the global ones, which is to grow."""
        student, teacher = outputs["student"], outputs["teacher"]
        spread = self._rate(student, teacher)
        gamma = self.settings.gamma or official_weight(student.shape[2], len(student))
        return {"alignment": alignment(student, teacher), "expansion": -gamma * spread}

    @torch.no_grad()
    def after_step(self, progress: float, applied: Tensor) -> None:
        """The teacher follows the student, at a momentum that goes from its first value to 1 by a cosine."""
        momentum = 1 - (1 - self.settings.momentum) * (math.cos(math.pi * progress) + 1) / 2
        self.teacher["backbone"].update(self.backbone, applied, momentum)
        self.teacher["head"].update(self.head, applied, momentum)

    @torch.no_grad()
    def on_weights_loaded(self) -> None:
        """The teacher starts where the student does."""
        self.teacher["backbone"].copy_from(self.backbone)

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """The student's coding rate over that of one repeated feature (1: collapsed), the cosine of the two global
        views of an image, and of views of different images; the features are the student's of the first global view."""
        student = self._project(self.backbone, self.head, views["global"])
        first, second = student.unbind(1)
        cosines = first @ second.mT
        own, number = cosines.diagonal().mean(), len(first)
        others = (cosines.sum() - cosines.diagonal().sum()) / max(number * (number - 1), 1)
        one = 0.5 * math.log1p(student.shape[2] / self.settings.eps)
        return {
            "coding_rate": coding_rate(first, self.settings.eps) / one,
            "same_image": own,
            "other_images": others if number > 1 else torch.full_like(own, torch.nan),
            "features": first,
        }

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor]]]:
        """The views of the first sample, global and local ones apart, as their sizes differ."""
        return {
            f"{name}_views": [(f"{name} view {n + 1}", view[0].float()) for n, view in enumerate(of_kind[0])]
            for name, of_kind in views.items()
        }

    def _rate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the global views of the coding rate R of all samples."""
        spread = student[:, : teacher.shape[1]]
        if self.settings.rate_of == "mean":
            spread = (spread + teacher) / 2
        return torch.stack([coding_rate(features, self.settings.eps) for features in spread.unbind(1)]).mean()

    def _project(self, backbone: Backbone, head: nn.Module, views: Tensor) -> Tensor:
        """Features (B, K, d) of K views (B, K, C, *size)."""
        images = as_volume(views.flatten(0, 1), backbone.strides[-1])
        return head(summary(backbone, images)).unflatten(0, views.shape[:2])


def alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ½‖z_c − z_g‖² = 1 − cos over all pairs of a view of the student and another one of the teacher.

    Args:
        student: (B, V, d) unit vectors, the global views first.
        teacher: (B, G, d) unit vectors of the global views.
    """
    cosines = student @ teacher.mT
    other = 1 - torch.eye(cosines.shape[1], cosines.shape[2], device=cosines.device)
    return ((1 - cosines) * other).sum() / (other.sum() * len(student))


def summary(backbone: Backbone, image: Tensor) -> Tensor:
    """What a network says of a whole image (B, F): its summary token, or mean and maximum of its coarsest map."""
    if backbone.has_summary:
        return backbone.summarised(image)[0]
    coarsest = backbone.features(image)[-1].flatten(2)
    return torch.cat((coarsest.mean(2), coarsest.amax(2)), 1)


def _width(backbone: Backbone) -> int:
    return backbone.channels[-1] * (1 if backbone.has_summary else 2)
