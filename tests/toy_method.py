"""A method that exists for tests: it needs what the real ones need and is small enough to read at a glance.

EMA teacher, queue of negatives, two modalities of one case, a template laid where the window lies, dropout, a
parameter group of its own, 2D and 3D.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.pretraining.pretrainer import Pretrainer
from nnssl_plugin.pretraining.settings import TrainingSettings


@dataclass(frozen=True)
class Settings:
    temperature: float = 0.2
    momentum: float = 0.9
    queue: int = 8
    break_from: int = -1
    """Step from which the loss is NaN (-1: never)."""
    break_until: int = -1


class Toy(PretextTask):
    """The student sees modality 0 with noise, the teacher modality 1; the queue holds the teacher's features."""

    needs = Needs(window="crop", modalities=2)
    trained_parts = ("encoder",)

    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        width = backbone.channels[-1]
        self.head = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, width))
        self.scale = nn.Parameter(torch.ones(()))
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(settings.queue, width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def views(self, batch, generator):
        first, second = batch["image"].unbind(1)
        noise = torch.randn(first.shape, generator=generator, device=first.device)
        template = torch.stack([_template(place, first.shape[1:]) for place in batch["places"]]).to(first.device)
        two = [torch.stack((view, view), 1) for view in (first + 0.1 * noise + template, second)]
        return {"student": two[0], "teacher": two[1], "origin": batch["origin"]}

    def encode(self, views):
        query = self.head(self.backbone.pooled(self.backbone.features(views["student"])))
        with torch.no_grad():
            key = self.teacher.pooled(self.teacher.features(views["teacher"]))
        outputs = {"query": F.normalize(query, dim=1), "key": F.normalize(key, dim=1)}
        outputs |= {"partial": query.var(1), "counts": views["origin"][:, -1] > 0}
        return outputs, {"size": 0.01 * query.square().mean(1)}

    def loss(self, outputs, progress):
        query, key = outputs["query"], outputs["key"].detach()
        self.latest = key
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ self.queue.clone().T), 1)
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
        contrast = F.cross_entropy(self.scale * logits / self.settings.temperature, target)
        broken = (self.steps >= self.settings.break_from) & (self.steps < self.settings.break_until)
        counts = outputs["counts"]
        partial = torch.where(counts, outputs["partial"], 0.0).sum() / counts.sum().clamp(min=1)
        return {
            "contrast": torch.where(broken, float("nan"), contrast) if self.training else contrast,
            "partial": partial,
        }

    @torch.no_grad()
    def on_weights_loaded(self):
        self.teacher.load_state_dict(self.backbone.state_dict())

    @torch.no_grad()
    def after_step(self, progress, applied):
        rate = (1 - self.settings.momentum) * applied
        for teacher, student in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            teacher.lerp_(student, rate.to(teacher.dtype))
        places = (self.pointer + torch.arange(len(self.latest), device=self.pointer.device)) % len(self.queue)
        self.queue[places] = torch.where(applied, self.latest, self.queue[places])
        self.pointer.add_(len(self.latest) * applied).remainder_(len(self.queue))
        self.steps.add_(1)

    def parameter_groups(self):
        others = [p for p in self.parameters() if p.requires_grad and p is not self.scale]
        return [{"params": others}, {"params": [self.scale], "lr_scale": 0.1, "clip": False}]

    @torch.no_grad()
    def diagnostics(self, views):
        pooled = self.backbone.pooled(self.backbone.features(views["student"]))
        return {"queue_norm": self.queue.norm(dim=1).mean(), "features": pooled}

    @torch.no_grad()
    def pictures(self, views):
        return {"toy": [("student", views["student"][0, 0]), ("teacher", views["teacher"][0, 0])]}


def _template(place, window) -> torch.Tensor:
    """A ramp over the case along its last axis, 0 to 1, as far as the window shows it."""
    voxels = place.origin[-1] + torch.arange(window[-1])
    return (voxels / place.case_shape[-1]).clamp(0, 1).expand(*window)


class ToyPretrainer(Pretrainer):
    method = "toy"
    training_defaults = TrainingSettings(epochs=4, iterations_per_epoch=5, validation_iterations=2, figure_every=2)
    method_defaults = Settings()
    citations = ("A toy.",)

    def build_task(self, backbone):
        return Toy(backbone, self.method_settings)
