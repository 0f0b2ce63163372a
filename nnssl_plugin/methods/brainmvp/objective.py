"""BrainMVP: a modality restored from another one of the case and from a template of its own.

Rui et al., "Multi-modal Vision Pre-training for Medical Image Analysis", sections 3.1 to 3.3. Φ(X, F) is X with most of
its voxels replaced by those of F.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.methods.brainmvp.settings import Settings
from nnssl_plugin.methods.brainmvp.views import draw_modalities
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.contrastive import symmetric_info_nce
from nnssl_plugin.objectives.reconstruction import mean_square
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views
from nnssl_plugin.transforms.channels import channel_of
from nnssl_plugin.transforms.masks import fill_masked, inside_case, random_block_mask, random_cubes_mask
from nnssl_plugin.transforms.placement import placed_windows

LEAST_RANGE = 1e-3
"""Added to the range of a template that is scaled by it; 1e-9, as in the public code, makes gradients of 1e9 of it."""


class BrainMVP(PretextTask):
    """The pretext task: L = L_CMR + λ_MD · L_MD + λ_CL · L_CL (Eq. 6), for one modality m of each case of a step.

    Args:
        backbone: the planned network with one input channel; encoder and decoder are trained.
        settings: :class:`Settings`.
        modalities: names of the dataset's channels, S of them.
        template_size: of a template in voxels, along the plan's axes.
        lr: largest learning rate of the network, to which that of the templates is set in relation.
    """

    needs = Needs(dimensions=(3,))
    trained_parts = ("encoder", "decoder")

    def __init__(
        self,
        backbone: Backbone,
        settings: Settings,
        *,
        modalities: Sequence[str],
        template_size: Sequence[int],
        lr: float,
    ):
        super().__init__(backbone, settings)
        self.modalities = tuple(modalities)
        self.templates = nn.Parameter(torch.zeros(len(self.modalities), *template_size))
        """T (S, *grid), one tensor for all modalities, so that every rank has a gradient for it at every step."""
        self.template_scale = settings.template_lr / lr
        self.register_buffer("progress", torch.zeros(()))
        """Of the training, as the last step said it: ``encode`` and ``views`` are not told."""

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """X_m and X_n (B, 1, *spatial), two independent masks, m (B,), and where each window lies."""
        image = batch["image"]
        size, together = tuple(image.shape[2:]), self.progress >= self.settings.contrast_from
        own, other, paired = draw_modalities(batch["available"], together, generator)
        return {
            "image": channel_of(image, own),
            "other": channel_of(image, other),
            "modality": own,
            "paired": paired,
            "masked_by_template": self._mask(len(image), size, generator),
            "masked_by_other": self._mask(len(image), size, generator),
            "inside": inside_case(batch["origin"], batch["case_shape"], size),
            "origin": batch["origin"],
            "case_shape": batch["case_shape"],
        }

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """``distillation`` (B,), L_MD of Eq. 3, and ``cross_modal`` (B,), L_CMR, mean squares over the voxels of the
        case; g and f of Eq. 4 (B, D), and the group (B,) of samples that they are compared with.

        A case with one modality takes part in the distillation alone.
        """
        maps, by_template, by_other = self.restored(views)
        takes_part = views["paired"] | ~self.crosses
        errors = [mean_square(each, views["image"], views["inside"]) for each in (by_template, by_other)]
        g, f = self._compared(maps[-1]).chunk(2)
        group = torch.where(views["paired"], views["modality"], -1)
        own = {"distillation": errors[0], "cross_modal": torch.where(takes_part, errors[1], 0.0)}
        return {"g": g, "f": f, "group": group}, own

    def loss(self, outputs: Views, progress: float) -> Terms:
        """``contrast``: L_CL of Eqs. 4 and 5, whose negatives g_jm have the modality of f_im."""
        temperature, group = self.settings.temperature, outputs["group"]
        return {"contrast": symmetric_info_nce(outputs["f"], outputs["g"], temperature=temperature, groups=group)}

    def weights(self, progress: float) -> dict[str, float]:
        """λ_MD, and λ_CL once the contrast has set in."""
        contrasts = progress >= self.settings.contrast_from
        return {
            "distillation": self.settings.template_weight,
            "contrast": self.settings.contrast_weight if contrasts else 0.0,
        }

    @torch.no_grad()
    def after_step(self, progress: float, applied: Tensor) -> None:
        """Remember how far the training is."""
        self.progress.fill_(progress)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The templates at their own rate and weight decay, and outside clipping, as a norm over millions of voxels
        would hold back the network."""
        others = [p for p in self.parameters() if p.requires_grad and p is not self.templates]
        own = {"lr_scale": self.template_scale, "weight_decay": self.settings.template_decay, "clip": False}
        return [{"params": others}, {"params": [self.templates]} | own]

    @property
    def crosses(self) -> Tensor:
        """() bool: whether the second view is filled with the other modality, not with the template."""
        return self.progress >= self.settings.template_warmup

    def restored(self, views: Views) -> tuple[list[Tensor], Tensor, Tensor]:
        """The encoder's maps of Φ(X_m, T_m) and Φ(X_m, X_n), one after the other (2B, …), and what is restored of each
        (B, 1, *spatial), without skips: what was not replaced may not pass by the bottleneck."""
        seen = torch.cat(self.seen(views))
        maps = self.backbone.features(seen)
        by_template, by_other = self.backbone.reconstruct(maps, skips=False).to(seen.dtype).chunk(2)
        return maps, by_template, by_other

    def seen(self, views: Views) -> tuple[Tensor, Tensor]:
        """Φ(X_m, T_m) and Φ(X_m, X_n) (B, 1, *spatial); gradients reach the voxels of T_m that stand in the first."""
        image, template = views["image"], self.placed(views)
        other = torch.where(self.crosses, views["other"], template)
        return (
            fill_masked(image, views["masked_by_template"], template),
            fill_masked(image, views["masked_by_other"], other),
        )

    def placed(self, views: Views) -> Tensor:
        """T_m (B, 1, *spatial) where each window lies, by the centre rule."""
        place = (views["modality"], views["origin"], views["case_shape"], tuple(views["image"].shape[2:]))
        return placed_windows(self.shown_templates(), *place)[:, None]

    def shown_templates(self) -> Tensor:
        """The templates (S, *grid) as the network sees them."""
        if self.settings.template_view == "raw":
            return self.templates
        return scaled_to_range(self.templates)

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """The errors without the cases that have one modality, that of the mean of X_m, the share of it that the first
        view explains, the cosine of the pairs, the spread of the templates, and the pooled features."""
        maps, by_template, by_other = self.restored(views)
        image, inside, paired = views["image"], views["inside"], views["paired"]
        mean = torch.where(inside, image, 0.0).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
        constant = mean_square(mean.reshape(-1, 1, 1, 1, 1), image, inside).mean()
        error = mean_square(by_template, image, inside).mean()
        g, f = self._compared(maps[-1]).chunk(2)
        return {
            "template_error": error,
            "cross_modal_error": _mean_of(mean_square(by_other, image, inside), paired),
            "mean_error": constant,
            "explained": torch.where(constant > 0, 1 - error / constant, torch.nan),
            "positive_cosine": _mean_of((f * g).sum(1), paired),
            "template_spread": self.templates.flatten(1).std(1).mean(),
            "features": self.backbone.pooled(maps)[: len(image)],
        }

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor]]]:
        """``templates``, each in its own range of intensities (the paper's figure 4), and ``reconstruction`` of the
        first sample from both views."""
        first = {name: view[:1] for name, view in views.items()}
        by_template, by_other = self.seen(first)
        _, from_template, from_other = self.restored(first)
        modality = self.modalities[int(first["modality"])]
        shown = {
            modality: first["image"],
            "with its template": by_template,
            "restored from it": from_template,
            "with another modality": by_other,
            "restored from that": from_other,
        }
        return {
            "templates": list(zip(self.modalities, scaled_to_range(self.templates), strict=True)),
            "reconstruction": [(title, each[0, 0].float()) for title, each in shown.items()],
        }

    def _mask(self, batch: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Voxels to replace (B, 1, *spatial), drawn anew for each sample."""
        edge, drawn = self.settings.block, {"ratio": self.settings.ratio, "generator": generator}
        if self.settings.masking == "grid":
            return random_block_mask(batch, size, block=edge, **drawn, device=generator.device)
        return random_cubes_mask(batch, size, edge=edge, **drawn, device=generator.device)

    def _compared(self, last: Tensor) -> Tensor:
        """Features (B, D) of length 1 of the encoder's last map."""
        vectors = last.flatten(2).mean(-1) if self.settings.features == "pooled" else last.flatten(1)
        return F.normalize(vectors.float(), dim=1)


def scaled_to_range(templates: Tensor) -> Tensor:
    """Each of the templates (S, *grid) scaled to [0, 1] by its own smallest and largest value."""
    shape = (-1, *[1] * (templates.ndim - 1))
    low, high = (extreme.reshape(shape) for extreme in torch.aminmax(templates.flatten(1), dim=1))
    return (templates - low) / (high - low + LEAST_RANGE)


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values (B,) that count; NaN where none does."""
    return torch.where(counted, values, 0.0).sum() / counted.sum()
