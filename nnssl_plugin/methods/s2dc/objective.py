"""S2DC: patches of a volume matched one to one with those of its augmented copy, and softened within structures.

Pan et al., "Structure-aware Semantic Discrepancy and Consistency for 3D Medical Image Self-supervised Learning",
section 3. L = L_g + L_p2p + L_p2s (Eq. 9); the student sees V, the teacher V'.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.diagnostics.collapse import feature_std
from nnssl_plugin.diagnostics.separation import cosine_gap, silhouette, token_labels
from nnssl_plugin.methods.s2dc.correspondence import (
    non_match_loss,
    patch_correspondence,
    patch_to_patch_loss,
    patch_to_structure_loss,
    visible_patches,
)
from nnssl_plugin.methods.s2dc.heads import RunningNorm, global_head, token_head
from nnssl_plugin.methods.s2dc.pictures import anchor_similarity_pictures, principal_component_pictures
from nnssl_plugin.methods.s2dc.settings import Settings
from nnssl_plugin.methods.s2dc.views import augmented_copy, cut, join, second_view
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.teacher import Teacher
from nnssl_plugin.networks.token_grid import TokenGrid
from nnssl_plugin.objectives.contrastive import FeatureQueue, info_nce, log_dual_softmax, sinkhorn_with_dustbin
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views


class Reading(NamedTuple):
    """What a network says of a window."""

    tokens: Tensor
    """(B, N, C), over the whole window."""
    grid: TokenGrid
    """Where they lie in the window."""
    pooled: Tensor
    """(B, K, C'), of each sub-volume."""


class Matching(NamedTuple):
    """How the patches of two views were assigned, and how they correspond."""

    similarity: Tensor
    """M_t: cosines (B, N, N) of the student's tokens of V with the teacher's of V'."""
    log_assignment: Tensor
    """log M̂, (B, N, N)."""
    matches: Tensor
    """M_gt, (B, N, N) bool."""


class S2DC(PretextTask):
    """The pretext task.

    A window is one patch of the plan, or a grid of patches, each of which passes the network alone; tokens are matched
    over the whole window.

    Args:
        backbone: the planned network; its encoder is trained.
        settings: :class:`Settings`.
        spacing: voxel size of the plan in mm, per axis.
    """

    needs = Needs(labels=True)
    trained_parts = ("encoder",)

    def __init__(self, backbone: Backbone, settings: Settings, *, spacing: Sequence[float]):
        super().__init__(backbone, settings)
        self.spacing = tuple(spacing)
        self.grid = settings.grid[-backbone.dimensions :]
        self.needs = replace(self.needs, margin=tuple(float(number) for number in self.grid))
        token_width = backbone.channels[backbone.stage(settings.token_stride)]
        self.heads = nn.ModuleDict(
            {
                "tokens": token_head(token_width, settings.hidden, settings.dim),
                "pooled": global_head(backbone.channels[-1], settings.hidden, settings.dim),
            }
        )
        self.norms = nn.ModuleDict({name: RunningNorm(backbone.channels[-1]) for name in ("student", "teacher")})
        self.teacher = nn.ModuleDict(
            {
                "backbone": Teacher(backbone, settings.momentum),
                "heads": Teacher(self.heads, settings.momentum),
            }
        )
        self.queue = FeatureQueue(settings.queue, settings.dim)
        self._step: Views  # outputs of the step at hand, which loss() leaves to after_step()

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """V, V' with its affine, with several sub-volumes also the copy of one of them; labels for the diagnostics."""
        image = batch["image"]
        drawn = {"spacing": self.spacing, "generator": generator}
        views = {"image": image} | second_view(image, self.settings, **drawn)
        if max(self.grid) > 1:
            views |= augmented_copy(image, self.grid, self.settings, **drawn)
        return views | ({"labels": batch["labels"]} if "labels" in batch else {})

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """``query`` and ``key`` (B, D) of the global term, of length 1, the pooled features (B, C) that they come from,
        and losses ``p2p`` and ``p2s`` (B,)."""
        student = self._read(self.backbone, views["image"])
        with torch.no_grad():
            teacher = self._read(self.teacher["backbone"].module, views["warped"])
        matching = self._match(student, teacher, views)
        pooled, others = _chosen(student.pooled, views), self._teachers_pooled(teacher, views)
        outputs = {
            "query": self._query(pooled),
            "key": self._key(others),
            "student_pooled": pooled.detach(),
            "teacher_pooled": others,
        }
        return outputs, self._own_losses(matching)

    def loss(self, outputs: Views, progress: float) -> Terms:
        """L_g of Eq. 1 over the samples of all ranks, against the features of earlier steps."""
        self._step = {name: values.detach() for name, values in outputs.items()}
        contrast = info_nce(
            outputs["query"],
            self._step["key"],
            self.queue.features,
            temperature=self.settings.temperature,
            known=self.queue.known,
        )
        return {"global": contrast}

    def weights(self, progress: float) -> dict[str, float]:
        """Eq. 9: 1, 1 and 1, unless set otherwise."""
        chosen = self.settings
        return {"global": chosen.global_weight, "p2p": chosen.p2p_weight, "p2s": chosen.p2s_weight}

    @torch.no_grad()
    def after_step(self, progress: float, applied: Tensor) -> None:
        """The teacher follows the student; the keys of this step become negatives, its features statistics."""
        self.teacher["backbone"].update(self.backbone, applied)
        self.teacher["heads"].update(self.heads, applied)
        for name, norm in self.norms.items():
            norm.update(self._step[f"{name}_pooled"], applied)
        self.queue.enqueue(self._step["key"], applied)

    @torch.no_grad()
    def on_weights_loaded(self) -> None:
        """The teacher starts where the student does."""
        self.teacher["backbone"].copy_from(self.backbone)

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Share of matches that the assignment finds, share of tokens that have one, spread of the encoder's tokens;
        with labels, how well they tell structures apart (figure 5); the features that L_g compares.

        The pooled features of the encoder would not do: behind an instance normalisation, each channel has nearly the
        same mean in every image, whatever was learned.
        """
        student = self._read(self.backbone, views["image"])
        teacher = self._read(self.teacher["backbone"].module, views["warped"])
        matching = self._match(student, teacher, views)
        found = F.one_hot(matching.log_assignment.argmax(2), matching.matches.shape[2]).bool() & matching.matches
        numbers = {
            "matching_accuracy": found.sum() / matching.matches.sum().clamp(min=1),
            "matched_share": matching.matches.any(2).float().mean(),
            "token_std": feature_std(student.tokens.flatten(0, 1)),
            "features": self._query(_chosen(student.pooled, views)),
        }
        return numbers | (_separation(student, views["labels"]) if "labels" in views else {})

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list]:
        """Both views, and the encoder's tokens of the first sample as in figures 1 and 6."""
        first = views["image"][:1]
        reading = self._read(self.backbone, first)
        image, tokens = first[0, 0].float(), reading.tokens[0].float()
        return {
            "views": [("V", image), ("V' (moved, intensities changed)", views["warped"][0, 0].float())],
            "similarity": anchor_similarity_pictures(image, tokens, grid=reading.grid),
            "components": principal_component_pictures(image, tokens, grid=reading.grid),
        }

    def _read(self, backbone: Backbone, window: Tensor) -> Reading:
        """Tokens of the whole window and pooled features of its sub-volumes."""
        parts = cut(window, self.grid)
        together = parts.shape[:2]
        features = backbone.features(parts.flatten(0, 1))
        tokens, cells = backbone.tokens(features, self.settings.token_stride)
        maps = join(tokens.mT.unflatten(2, cells).unflatten(0, together), self.grid)
        grid = backbone.token_grid(maps.shape[2:], self.settings.token_stride)
        return Reading(maps.flatten(2).mT, grid, backbone.pooled(features).unflatten(0, together))

    def _match(self, student: Reading, teacher: Reading, views: Views) -> Matching:
        """Cosines of projected tokens, their assignment (Eq. 4), and the true matches (Eqs. 2 and 3)."""
        tokens = _unit(self.heads["tokens"](student.tokens))
        with torch.no_grad():
            others = _unit(self.teacher["heads"].module["tokens"](teacher.tokens))
        with torch.autocast(tokens.device.type, enabled=False):
            similarity = tokens @ others.mT
            return Matching(similarity, self._assign(similarity), self._matches(views, student.grid))

    def _assign(self, similarity: Tensor) -> Tensor:
        if self.settings.assignment == "dual_softmax":
            return log_dual_softmax(similarity, self.settings.matching_temperature)
        plan = sinkhorn_with_dustbin(
            similarity / self.settings.matching_temperature,
            dustbin=self.settings.dustbin,
            iterations=self.settings.sinkhorn_iterations,
        )
        return plan[:, :-1, :-1]

    @torch.no_grad()
    def _matches(self, views: Views, grid: TokenGrid) -> Tensor:
        """M_gt without the patches that show padding alone, in either view."""
        matches = patch_correspondence(views["affine"], grid)
        source = visible_patches(views["image"], torch.ones_like(views["valid"]), grid)
        target = visible_patches(views["warped"], views["valid"], grid)
        return matches & source[:, :, None] & target[:, None, :]

    def _own_losses(self, matching: Matching) -> Terms:
        similarity = matching.similarity
        if self.settings.detach_weights:
            similarity = similarity.detach()
        p2p = patch_to_patch_loss(matching.log_assignment, matching.matches)
        if self.settings.negatives:
            p2p = p2p + non_match_loss(matching.log_assignment, matching.matches)
        return {"p2p": p2p, "p2s": patch_to_structure_loss(matching.log_assignment, matching.matches, similarity)}

    def _query(self, pooled: Tensor) -> Tensor:
        """The student's feature (B, D), of length 1, from its pooled ones (B, C)."""
        return _unit(self.heads["pooled"](self.norms["student"](pooled)))

    @torch.no_grad()
    def _key(self, pooled: Tensor) -> Tensor:
        """The teacher's feature (B, D), of length 1, from its pooled ones (B, C)."""
        return _unit(self.teacher["heads"].module["pooled"](self.norms["teacher"](pooled)))

    @torch.no_grad()
    def _teachers_pooled(self, teacher: Reading, views: Views) -> Tensor:
        """The teacher's pooled features (B, C): of V', or of the copy of the chosen sub-volume."""
        if "copy" not in views:
            return teacher.pooled[:, 0]
        network = self.teacher["backbone"].module
        return network.pooled(network.features(views["copy"]))


def _chosen(pooled: Tensor, views: Views) -> Tensor:
    """The pooled feature (B, C) of the chosen sub-volume of each sample, of the only one where there is one."""
    if "chosen" not in views:
        return pooled[:, 0]
    return pooled[torch.arange(len(pooled), device=pooled.device), views["chosen"]]


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _separation(reading: Reading, labels: Tensor) -> Terms:
    """Figure 5's silhouette, and the mean cosine of same-label tokens less that of the others: of the structures among
    themselves, as in the figure, and with the background as one more label. NaN where there are no two labels."""
    tokens = reading.tokens.flatten(0, 1).float()
    named = token_labels(labels, reading.grid.sums).flatten()
    kinds = {"": named.where(named > 0, -1), "_with_background": named}
    return {
        f"{name}{kind}": torch.as_tensor(measure(tokens, chosen), device=tokens.device)
        for kind, chosen in kinds.items()
        for name, measure in (("silhouette", silhouette), ("cosine_gap", cosine_gap))
    }
