"""The toy method with what its one class cannot have at once: each variant adds one clause of the contract."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fake_dataset import NAME, write_fake_dataset
from small_patch_vit import with_patch_vit
from small_primus import with_primus
from toy_method import Toy, ToyPretrainer

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.transforms.crops import Crops, multi_crop

SLICES = "Dataset902_Slices"
SOURCES = [
    {"dataset": NAME, "kind": "volume", "batch_size": 2},
    {"dataset": SLICES, "configuration": "2d", "kind": "slice", "batch_size": 3, "weight": 2},
]


class CroppedToy(Toy):
    """The student also sees small crops, whose features shall be those of the large ones."""

    def views(self, batch, generator):
        image, dimensions = batch["image"], self.backbone.dimensions
        kinds = {
            "global": Crops(2, (16,) * dimensions, (0.6, 1.0), flip=0.5),
            "local": Crops(3, (8,) * dimensions, (0.3, 0.6)),
        }
        crops = {
            name: multi_crop(image, crops, spacing=(1.0,) * dimensions, generator=generator)[0]
            for name, crops in kinds.items()
        }
        return super().views(batch, generator) | crops

    def encode(self, views):
        outputs, own = super().encode(views)
        large, small = (self._pooled(views[name]) for name in ("global", "local"))
        return outputs, own | {"crops": (small.mean(1) - large.mean(1)).square().mean(1)}

    def _pooled(self, crops):
        return self.backbone.pooled(self.backbone.features(crops.flatten(0, 1))).unflatten(0, crops.shape[:2])


class FittedToy(Toy):
    """Sees whole cases, in 2D slices that show something."""

    needs = Needs(window="fit", foreground_share=1.0, modalities=2)


class NeighbourToy(Toy):
    """Sees two neighbouring windows of each case."""

    needs = Needs(modalities=2, slices_per_case=2)


class OneModalityToy(Toy):
    """Student and teacher see one of the case's modalities each."""

    def views(self, batch, generator):
        image = batch["image"]
        drawn = torch.rand(image.shape[:2], generator=generator, device=image.device).argsort(1)
        chosen = image[torch.arange(len(image))[:, None], drawn[:, :2]]
        return {"student": chosen[:, :1], "teacher": chosen[:, 1:], "origin": batch["origin"]}


class MixedToy(Toy):
    """Brings images of one or two channels, flat or not, to two channels of 16 x 16 x 16."""

    needs = Needs(unifies=True)
    seen = ()

    def views(self, batch, generator):
        image = batch["image"]
        if image.ndim == 4:
            image = image[:, :, None].expand(-1, -1, 16, -1, -1)
        image = F.interpolate(image, size=(16, 16, 16)).expand(-1, 2, -1, -1, -1)
        self.seen = (*self.seen, (batch["kind"], tuple(batch["image"].shape)))
        return super().views(batch | {"image": image}, generator)


class OwnRankToy(Toy):
    """Its loss needs no other rank's samples; its queue takes those of all."""

    gathers = False

    def loss(self, outputs, progress):
        terms = super().loss(outputs, progress)
        self.rows = len(outputs["key"])
        self.latest = self.gather({"key": outputs["key"].detach()})["key"]
        return terms


class TokenToy(Toy):
    """A quarter of the patches, encoded alone, shall say what the summary of the whole image says."""

    def views(self, batch, generator):
        views = super().views(batch, generator)
        strides, size = self.backbone.strides[-1], views["student"].shape[2:]
        patches = torch.tensor([length // stride for length, stride in zip(size, strides, strict=True)]).prod()
        order = torch.rand(len(views["student"]), patches, generator=generator, device=generator.device).argsort(1)
        return views | {"keep": order[:, : patches // 4]}

    def encode(self, views):
        outputs, own = super().encode(views)
        backbone, image = self.backbone, views["student"]
        whole = backbone.summarised(image)[0] if backbone.has_summary else backbone.pooled(backbone.features(image))
        kept = backbone.kept_tokens(image, views["keep"]).mean(1)
        return outputs, own | {"kept": (kept - whole).square().mean(1)}


class VariantPretrainer(ToyPretrainer):
    kind: type[Toy]

    def build_task(self, backbone):
        return self.kind(backbone, self.method_settings)


class CroppedPretrainer(VariantPretrainer):
    kind = CroppedToy


class FittedPretrainer(VariantPretrainer):
    kind = FittedToy


class NeighbourPretrainer(VariantPretrainer):
    kind = NeighbourToy


class OneModalityPretrainer(VariantPretrainer):
    kind = OneModalityToy

    def network_channels(self, channels):
        return 1


class MixedPretrainer(VariantPretrainer):
    kind = MixedToy


class OwnRankPretrainer(VariantPretrainer):
    kind = OwnRankToy


class TokenPretrainer(VariantPretrainer):
    kind = TokenToy


@dataclass(frozen=True)
class Variant:
    """A trainer and the dataset and plan that bring its clause about."""

    trainer: type[ToyPretrainer]
    plan: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``make_trainer``."""
    prepare: Callable[[], object] = bool
    """Writes what else it draws from."""


def write_slices() -> dict:
    """Images of one channel whose plan is 2D, with another size than the volumes."""
    return write_fake_dataset(name=SLICES, cases=4, channels=1, dimensions=2, shape=(15, 24, 28))


SGD = {"optimiser": "sgd", "schedule": "poly", "lr": 1e-2, "weight_decay": 3e-5}
ADAMW = {
    "betas": [0.8, 0.95],
    "schedule": "halving",
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "layer_decay": 0.7,
}
VARIANTS = {
    "places, a queue, a loss of some samples": Variant(ToyPretrainer),
    "in 2D": Variant(ToyPretrainer, {"dimensions": 2}),
    "views of two sizes": Variant(CroppedPretrainer),
    "views of two sizes in 2D": Variant(CroppedPretrainer, {"dimensions": 2}),
    "views of two sizes in chunks": Variant(CroppedPretrainer, {"pretraining": {"batch_size": 3, "chunk_size": 2}}),
    "cases fitted, foreground only": Variant(FittedPretrainer),
    "slices fitted, foreground only": Variant(FittedPretrainer, {"dimensions": 2}),
    "neighbouring windows": Variant(NeighbourPretrainer, {"pretraining": {"batch_size": 3}}),
    "neighbouring slices": Variant(NeighbourPretrainer, {"dimensions": 2, "pretraining": {"batch_size": 4}}),
    "a network of one channel": Variant(OneModalityPretrainer),
    "several datasets": Variant(MixedPretrainer, {"pretraining": {"sources": SOURCES}}, write_slices),
    "a loss of its own rank": Variant(OwnRankPretrainer),
    "a loss of its own rank in chunks": Variant(OwnRankPretrainer, {"pretraining": {"batch_size": 3, "chunk_size": 2}}),
    "kept tokens and a summary": Variant(TokenPretrainer, {"network": with_patch_vit}),
    "kept tokens and a summary in 2D": Variant(TokenPretrainer, {"network": with_patch_vit, "dimensions": 2}),
    "kept tokens without a summary": Variant(TokenPretrainer, {"network": with_primus}),
    "batch normalisation": Variant(ToyPretrainer, {"batch_norm": True}),
    "SGD": Variant(ToyPretrainer, {"pretraining": SGD}),
    "AdamW that changes, layer by layer": Variant(ToyPretrainer, {"pretraining": ADAMW}),
}
"""Clause of the contract → what uses it."""
