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
    """

    needs = Needs(window="slice", triplets=True, dimensions=(3,))
    trained_parts = ("encoder", "decoder")

    def __init__(self, backbone: Backbone, settings: Settings, embedding_dim: int):
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
        )
        # M of the Mahalanobis distance, shared by images and texts; the identity starts at the Euclidean distance
        self.metric = nn.Parameter(torch.eye(embedding_dim))

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
        image, text = mpot_loss(
            outputs["volume"],
            torch.stack((outputs["image"], outputs["text"])),
            self.metric,
            mass=self.settings.mass,
            epsilon=self.settings.epsilon,
            iterations=self.settings.iterations,
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
        """M = Proj(M), the last line of Algorithm 1 (on CUDA the eigendecomposition waits for the device)."""
        self.metric.copy_(torch.where(applied, project_psd(self.metric), self.metric))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything trained; M and V_p without weight decay, which would pull them to 0 where no slice falls."""
        spared = [self.metric, self.psat.plane_slice]
        names = {id(parameter) for parameter in spared}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in names]
        return [{"params": others}, {"params": spared, "weight_decay": 0.0}]

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Share of volumes whose nearest image or text is their own, smallest eigenvalue of M, embeddings (B, E)."""
        outputs, _ = self.encode(views)
        return {
            "retrieval_image": self._retrieval(outputs["volume"], outputs["image"]),
            "retrieval_text": self._retrieval(outputs["volume"], outputs["text"]),
            "metric_smallest_eigenvalue": torch.linalg.eigvalsh(self.metric)[0],
            "features": outputs["volume"],
        }

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor]]]:
        """Input, corrupted input and reconstruction, channel 0 of the first sample."""
        restored = self._reconstruct(self.backbone.features(views["corrupted"][:1]))
        shown = {"input": views["image"], "corrupted": views["corrupted"], "reconstruction": restored}
        return {"reconstruction": [(title, image[0, 0].float()) for title, image in shown.items()]}

    def _reconstruct(self, features: list[Tensor]) -> Tensor:
        return self.backbone.reconstruct(features, skips=self.settings.corruption != "none").float()

    def _retrieval(self, volume: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(volume.device.type, enabled=False):
            nearest = mahalanobis_cost(volume, target, self.metric).argmin(1)
        return (nearest == torch.arange(len(volume), device=volume.device)).float().mean()


def _mean_square(error: Tensor, available: Tensor) -> Tensor:
    """Mean square (B,) of the error (B, C, *spatial) over the channels that each case has (B, C)."""
    per_channel = error.square().flatten(2).mean(2)
    share = available.to(per_channel.dtype)
    return (per_channel * share).sum(1) / share.sum(1).clamp(min=1)
