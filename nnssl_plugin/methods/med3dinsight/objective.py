"""Med3DInsight: alignment of a volume with its slice and the slice's description, and reconstruction of the volume.

Chen, Yao, Ye & Hong, "Enhancing 3D Medical Image Understanding with Pretraining Aided by 2D Multimodal Large Language
Models", sections III-B to III-D. The image and text encoders are frozen, so their embeddings come with the batch.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.methods.med3dinsight.psat import PlaneSliceAwareTransformer
from nnssl_plugin.methods.med3dinsight.settings import Settings
from nnssl_plugin.methods.med3dinsight.views import corrupt
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.partial_transport import mahalanobis_cost, mpot_loss, project_psd
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views


class Med3DInsight(PretextTask):
    """The pretext task: L = KL(π̂‖π^{X,S}) + KL(π̂‖π^{X,T}) + L_res (Eqs. 2 to 4).

    One forward of the encoder serves both branches: from the corrupted volume, the bottleneck goes to the alignment,
    the whole pyramid to the reconstruction.

    Args:
        backbone: the planned network; encoder and decoder are trained.
        settings: :class:`Settings`.
        embedding_dim: E of the image and text embeddings.
        steps: optimiser steps of the run, by which ``progress`` tells the number of a step.
    """

    needs = Needs(window="slice", placement="free", triplets=True, dimensions=(3,))
    trained_parts = ("encoder", "decoder")

    def __init__(self, backbone: Backbone, settings: Settings, embedding_dim: int, steps: int = 1):
        super().__init__(backbone, settings)
        if settings.field_of_view == "resize":
            self.needs = replace(self.needs, window="whole")
        self.psat = PlaneSliceAwareTransformer(
            backbone.channels[-1],
            embedding_dim,
            dim=settings.dim,
            queries=settings.queries,
            layers=settings.layers,
            heads=settings.heads,
            mlp_ratio=settings.mlp_ratio,
            slice_bins=settings.slice_bins,
            output=settings.output,
        )
        # M of the Mahalanobis distance, shared by images and texts; the identity starts at the Euclidean distance
        self.metric = nn.Parameter(torch.eye(embedding_dim))
        self.steps = steps

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """The volume, the corrupted volume, the place of the slice, and the frozen embeddings."""
        return {
            "image": batch["image"],
            "corrupted": corrupt(batch["image"], self.settings, generator),
            "available": batch["available"],
            "plane": batch["plane"],
            "position": batch["slice_position"],
            "image_embedding": F.normalize(batch["image_embedding"].float(), dim=1),
            "text_embedding": F.normalize(batch["text_embedding"].float(), dim=1),
        }

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """Embeddings ``volume``, ``image``, ``text`` (B, E), and ``reconstruction`` (B,): L_res as a mean square.

        Eq. 3 as printed, a norm summed over 128³ voxels, would outweigh the alignment a hundredfold.
        """
        features = self.backbone.features(views["corrupted"])
        tokens, grid = self.backbone.tokens(features)
        outputs = {
            "volume": self.psat(tokens, grid, views["plane"], views["position"]),
            "image": views["image_embedding"],
            "text": views["text_embedding"],
        }
        restored = self._reconstruct(features)
        return outputs, {"reconstruction": _mean_square(restored - views["image"], views["available"])}

    def loss(self, outputs: Views, progress: float) -> Terms:
        """The two terms of Eq. 2 over the samples of all ranks, each shifted so that 0 is a perfect match."""
        volume, image, text = (self._compared(outputs[name]) for name in ("volume", "image", "text"))
        image, text = mpot_loss(
            volume,
            torch.stack((image, text)),
            self.metric,
            mass=self.settings.mass,
            epsilon=self.settings.epsilon,
            iterations=self.settings.iterations,
            solver=self.settings.solver,
        )
        return {"mpot_image": image, "mpot_text": text}

    def weights(self, progress: float) -> dict[str, float]:
        """Eq. 4: 1 and 1, unless set otherwise."""
        alignment = self.settings.alignment_weight
        return {
            "mpot_image": alignment,
            "mpot_text": alignment,
            "reconstruction": self.settings.reconstruction_weight,
        }

    @torch.no_grad()
    def after_step(self, progress: float, applied: Tensor) -> None:
        """M = Proj(M), the last line of Algorithm 1, in every ``project_every``-th step and the last one.

        A step that was skipped owes the projection of those before it all the same. The projection waits for the
        device. Between two of them the cost is that of M, where its quadratic form is negative 0.
        """
        done = round(progress * self.steps) + 1
        if done % self.settings.project_every == 0 or done == self.steps:
            self.metric.copy_(project_psd(self.metric))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything trained; M and V_p without weight decay, which would pull them to 0 where no slice falls."""
        spared = [self.metric, self.psat.plane_slice]
        names = {id(parameter) for parameter in spared}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in names]
        return [{"params": others}, {"params": spared, "weight_decay": 0.0}]

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Retrieval of slices and texts, its controls and its chance, smallest eigenvalue of M, features (B, E).

        The controls give the transformer the place of each slice with another volume: that of another case, or an empty
        one. What they find above chance is found without looking at the volume. For the same reason ``features`` is
        what the volume adds to the embedding of an empty one, beside a constant: a volume that adds nothing is the same
        direction for all.
        """
        tokens, grid = self.backbone.tokens(self.backbone.features(views["corrupted"]))
        empty, _ = self.backbone.tokens(self.backbone.features(torch.zeros_like(views["corrupted"][:1])))
        volumes = {"": tokens, "_other_case": tokens.roll(1, 0), "_empty": empty.expand_as(tokens)}
        found = {name: self.psat(seen, grid, views["plane"], views["position"]) for name, seen in volumes.items()}
        measures = {"metric_smallest_eigenvalue": torch.linalg.eigvalsh(self.metric)[0]}
        for kind in ("image", "text"):
            target = views[f"{kind}_embedding"]
            measures |= {
                f"retrieval_{kind}{name}": retrieval(self._compared(volume), self._compared(target), self.metric)
                for name, volume in found.items()
            }
            measures[f"retrieval_{kind}_chance"] = 1 / _first_of_equal(target).float().sum()
        if len(tokens) == 1:
            measures = {name: value for name, value in measures.items() if not name.endswith("_other_case")}
        constant = tokens.new_ones(1, found[""].shape[1], dtype=torch.float32)
        return measures | {"features": found[""] - found["_empty"] + F.normalize(constant)}

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor]]]:
        """Input, corrupted input and reconstruction, channel 0 of the first sample."""
        restored = self._reconstruct(self.backbone.features(views["corrupted"][:1]))
        shown = {"input": views["image"], "corrupted": views["corrupted"], "reconstruction": restored}
        return {"reconstruction": [(title, image[0, 0].float()) for title, image in shown.items()]}

    def _compared(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, E) of a step as they are compared: with ``centre``, unit vectors away from their mean."""
        if not self.settings.centre or len(embeddings) == 1:
            return embeddings
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.normalize(embeddings - embeddings.mean(0), dim=1, eps=1e-4)  # no difference stays none

    def _reconstruct(self, features: list[Tensor]) -> Tensor:
        return self.backbone.reconstruct(features, skips=self.settings.corruption != "none").float()


def retrieval(volume: Tensor, target: Tensor, metric: Tensor) -> Tensor:
    """Share () of the volumes (B, E) whose nearest target (B, E) is their own; equal targets count as one."""
    first = _first_of_equal(target)
    with torch.autocast(volume.device.type, enabled=False):
        cost = mahalanobis_cost(volume, target, metric).masked_fill(~first, torch.inf)
    return (target[cost.argmin(1)] == target).all(1).float().mean()


def _first_of_equal(rows: Tensor) -> Tensor:
    """Which of the rows (B, E) is the first of its kind, (B,) bool."""
    equal = (rows[:, None] == rows[None]).all(2)
    return ~equal.tril(-1).any(1)


def _mean_square(error: Tensor, available: Tensor) -> Tensor:
    """Mean square (B,) of the error (B, C, *spatial) over the channels that each case has (B, C)."""
    per_channel = error.square().flatten(2).mean(2)
    share = available.to(per_channel.dtype)
    return (per_channel * share).sum(1) / share.sum(1).clamp(min=1)
