"""M3Ret's masked autoencoding: the encoder sees a quarter of the patches, a small decoder restores the others.

Liu et al., M3Ret, section 3.2, equation 1; He et al., "Masked Autoencoders Are Scalable Vision Learners", section 3.
"""

import math

import torch
from torch import Tensor

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.m3ret.inputs import as_volume, unified
from nnssl_plugin.methods.m3ret.mae.heads import PatchDecoder
from nnssl_plugin.methods.m3ret.mae.patches import grid_of, patchify, unpatchify
from nnssl_plugin.methods.m3ret.mae.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views
from nnssl_plugin.transforms.masks import fill_masked, mask_all_but, random_ids


class M3RetMAE(PretextTask):
    """The pretext task.

    Args:
        backbone: the planned network, a transformer over patches; its encoder is trained.
        settings: :class:`Settings`.
        channels: that every image gets; ``None`` for those of the one dataset.

    Raises:
        UserError: for a network that needs the whole image.
    """

    needs = Needs(window="fit", unifies=True)
    trained_parts = ("encoder",)

    def __init__(self, backbone: Backbone, settings: Settings, *, channels: int | None = None):
        super().__init__(backbone, settings)
        if not backbone.encodes_subsets:
            raise UserError(
                f"M3Ret's masked autoencoding encodes some patches alone, which {type(backbone.network).__name__} "
                "cannot do.",
                "Plan a transformer (nnssl_plugin plan -d ID -n NAME --preset patch-vit-s m3ret-mae), or mask the "
                "image of this network: -tr MAEPretrainer",
            )
        self.channels = channels
        self.patch = backbone.strides[-1]
        self.decoder = PatchDecoder(
            backbone.channels[-1],
            settings.decoder_width,
            settings.decoder_blocks,
            settings.decoder_heads,
            backbone.input_channels * math.prod(self.patch),
        )

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """The image (B, C, *window) and the patches (B, K) that are encoded."""
        image = as_volume(unified(batch, self.settings, self.channels, generator), self.patch)
        total = math.prod(grid_of(image.shape[2:], self.patch))
        kept = total - math.floor(total * self.settings.ratio + 1e-9)
        return {
            "image": image,
            "keep": random_ids(len(image), total, kept, generator=generator, device=image.device),
        }

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """``reconstruction`` (B,), equation 1: the squared error of the masked patches."""
        patches = patchify(views["image"], self.patch)
        if self.settings.normalised_patches:
            variance, mean = torch.var_mean(patches, 2, keepdim=True)
            patches = (patches - mean) * (variance + 1e-6).rsqrt()
        loss = masked_error(self.restore(views), patches, views["keep"])
        return {}, {"reconstruction": loss * (patches.shape[2] if self.settings.reduction == "sum" else 1)}

    def restore(self, views: Views) -> Tensor:
        """Predicted patches (B, N, P) of the whole image, in float32."""
        image, keep = views["image"], views["keep"]
        tokens = self.backbone.kept_tokens(image, keep)
        return self.decoder(tokens, keep, grid_of(image.shape[2:], self.patch)).float()

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """The mean squared error of masked patches, that of the mean of the visible ones in their place, and the share
        explained: one less their ratio, 0 where nothing was learned that a constant does not know. The features are
        those that retrieval uses, of the whole image."""
        error, control = self._errors(views)
        features = self.backbone.pooled(self.backbone.features(views["image"]))
        explained = torch.where(control > 0, 1 - error / control, torch.nan)
        return {"masked_error": error, "visible_mean_error": control, "explained": explained, "features": features}

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor]]]:
        """Image, masked image and reconstruction of the first sample."""
        first = {name: view[:1] for name, view in views.items()}
        image = first["image"]
        size = image.shape[2:]
        masked = mask_all_but(first["keep"], size, self.patch)
        restored = unpatchify(self.restore(first), self.patch, grid_of(size, self.patch))
        shown = {"input": image, "masked": fill_masked(image, masked, 0.0)}
        if not self.settings.normalised_patches:
            shown["masked patches reconstructed"] = torch.where(masked, restored, image)
        return {"reconstruction": [(title, each[0, 0].float()) for title, each in shown.items()]}

    def _errors(self, views: Views) -> tuple[Tensor, Tensor]:
        patches, keep = patchify(views["image"], self.patch).float(), views["keep"]
        seen = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
        mean = seen.mean((1, 2), keepdim=True).expand_as(patches)
        restored = self.restore(views)
        if self.settings.normalised_patches:  # the network does not know their brightness: lend it the true one
            variance, middle = torch.var_mean(patches, 2, keepdim=True)
            restored = restored * (variance + 1e-6).sqrt() + middle
        return masked_error(restored, patches, keep).mean(), masked_error(mean, patches, keep).mean()


def masked_error(restored: Tensor, patches: Tensor, keep: Tensor) -> Tensor:
    """Equation 1 up to its constant: mean square (B,) over the numbers of the patches that were not kept.

    Args:
        restored: (B, N, P).
        patches: (B, N, P).
        keep: (B, K) long.
    """
    errors = (restored - patches).square().mean(2)
    masked = torch.ones_like(errors).scatter(1, keep, 0.0)
    return (errors * masked).sum(1) / masked.sum(1)
