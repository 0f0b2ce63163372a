"""LVM-Med: images are told apart by matching the graph of their first views with the graph of their second ones.

Nguyen et al., "LVM-Med: Learning Large-Scale Self-Supervised Vision Models for Medical Imaging via Second-order Graph
Matching", section 3.2 and the pseudo-code of appendix A.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.diagnostics.collapse import feature_std
from nnssl_plugin.methods.lvm_med.affinities import GraphConvolution, cosines, local_affinity, node_affinity
from nnssl_plugin.methods.lvm_med.settings import Settings
from nnssl_plugin.methods.lvm_med.views import image_boxes, places_in_image, random_view, with_channels
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.graph_matching import (
    edge_cosines,
    edge_matches,
    graph_matching,
    gumbel_noise,
    hamming_loss,
    match_graphs,
    nearest_neighbour_edges,
)
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views

VIEWS = ("source", "target")
"""x^s and x^t."""
SHOWN = 4
"""Nodes of the first graph in the picture of matches."""


class GraphPairs(NamedTuple):
    """G pairs of graphs with n nodes each, whose target nodes are permuted, and their affinities."""

    node_affinity: Tensor
    """c^v (G, n, n)."""
    edge_affinity: Tensor
    """c^e (G, Eₛ, Eₜ)."""
    edges_source: Tensor
    """(G, Eₛ, 2)."""
    edges_target: Tensor
    """(G, Eₜ, 2)."""
    truth: Tensor
    """v*, the target node of every source node, (G, n)."""


class LVMMed(PretextTask):
    """The pretext task, of 2D configurations.

    The rows of a rank's batch form graphs of 16 in their order, which is random but for neighbouring slices.

    Args:
        backbone: the planned network; its encoder is trained.
        settings: :class:`Settings`.
        size: of the views in voxels, the plan's patch size.
        spacing: voxel size of the plan in mm, per axis.
    """

    needs = Needs(foreground_share=1.0, dimensions=(2,), unifies=True)
    trained_parts = ("encoder",)
    gathers = False

    def __init__(self, backbone: Backbone, settings: Settings, *, size: Sequence[int], spacing: Sequence[float]):
        super().__init__(backbone, settings)
        self.needs = replace(self.needs, slices_per_case=settings.slices_per_case)
        self.size, self.spacing = tuple(size), tuple(spacing)
        self.projector = nn.Linear(backbone.channels[-1], settings.dim)
        self.message_passing = GraphConvolution(settings.dim, settings.layers, residual=settings.residual)

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """Both views and their affines; the noise of Algorithm 1, ``node_noise`` (B, n) and ``edge_noise`` (B, k, n·k);
        ``order`` (B,), by which the target nodes of each graph are permuted."""
        image = with_channels(batch["image"], batch["available"], self.backbone.input_channels, generator)
        boxes = image_boxes(image, self.settings, spacing=self.spacing, generator=generator)
        views = {}
        for name in VIEWS:
            shown = random_view(image, boxes, self.size, self.settings, spacing=self.spacing, generator=generator)
            views[name], affine = shown
            views[f"{name}_places"] = self._places(affine, image.shape[2:])
        rows = len(image)
        nodes, neighbours = self._graph_size(rows)
        shapes = {"node_noise": (rows, nodes), "edge_noise": (rows, neighbours, nodes * neighbours)}
        views |= {name: self.settings.noise * gumbel_noise(shape, generator) for name, shape in shapes.items()}
        return views | {"order": torch.rand(rows, generator=generator, device=image.device)}

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """Of both views the embedding z (B, F), and the cells q (B, P, D) of the local affinity with their places."""
        features = self.backbone.features(torch.cat([views[name] for name in VIEWS]))
        embeddings = self.projector(self.backbone.pooled(features)).chunk(2)
        cells = self.backbone.tokens(features, self.settings.token_stride)[0].chunk(2)
        outputs = {name: views[name] for name in ("node_noise", "edge_noise", "order")}
        for name, z, q in zip(VIEWS, embeddings, cells, strict=True):
            outputs |= {f"{name}_z": z, f"{name}_q": q, f"{name}_places": views[f"{name}_places"]}
        return outputs, {}

    def loss(self, outputs: Views, progress: float) -> Terms:
        """``matching``: the Hamming loss of Eq. 5 over 2n, which is the share of nodes that are matched wrongly."""
        with torch.autocast(outputs["source_z"].device.type, enabled=False):
            pairs = self._pairs(outputs)
            nodes = pairs.truth.shape[1]
            matching = graph_matching(
                pairs.node_affinity - self.settings.margin * F.one_hot(pairs.truth, nodes),
                *pairs[1:4],
                strength=self.settings.strength,
                node_noise=self._of_graphs(outputs["node_noise"]).detach(),
                edge_noise=self._of_graphs(outputs["edge_noise"]).detach(),
                solver=self.settings.solver,
            )
            return {"matching": hamming_loss(matching, pairs.truth).mean() / (2 * nodes)}

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Without noise: the share of nodes that are matched rightly, with and without edges, its chance, and the share
        of source edges whose matched nodes are joined in the target; the spread of z; the features."""
        outputs, _ = self.encode(views)
        with torch.autocast(outputs["source_z"].device.type, enabled=False):
            pairs = self._pairs(outputs)
            second, first = (match_graphs(*pairs[:4], solver=solver) for solver in ("fw", "lap"))
            kept = edge_matches(second, *pairs[2:4]).any(-1)
            return {
                "matching_accuracy": (second == pairs.truth).float().mean(),
                "first_order_accuracy": (first == pairs.truth).float().mean(),
                "chance": second.new_tensor(1 / pairs.truth.shape[1], dtype=torch.float32),
                "kept_edges": kept.float().sum() / max(1, kept.numel()),
                "embedding_std": feature_std(outputs["source_z"]),
                "features": self._embeddings(outputs)[0],
            }

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list]:
        """Some images of the first graph with the views that they were matched with, and its node affinities."""
        outputs, _ = self.encode(views)
        pairs = self._pairs(outputs)
        found, order = match_graphs(*pairs[:4])[0], pairs.truth[0].argsort()
        matches: list = []
        for node in range(min(SHOWN, len(found))):
            partner = int(order[found[node]])
            verdict = "right" if partner == node else "wrong"
            matches.append((f"image {node + 1}", views["source"][node, 0].float()))
            matches.append((f"matched with image {partner + 1}: {verdict}", views["target"][partner, 0].float()))
        affinity = pairs.node_affinity[0].gather(1, pairs.truth[0].expand(len(found), -1))
        return {"matches": matches, "affinity": [("c^v, true pairs on the diagonal", affinity.float())]}

    def _pairs(self, outputs: Views) -> GraphPairs:
        """The graphs of both views and their affinities (sections 3.2.1 to 3.2.3)."""
        order = self._of_graphs(outputs["order"]).detach().argsort(1)
        source, target = (self._of_graphs(z) for z in self._embeddings(outputs))
        target = _permuted(target, order)
        edges = [nearest_neighbour_edges(x, self.settings.neighbours) for x in (source, target)]
        source, target = (self.message_passing(x, e) for x, e in zip((source, target), edges, strict=True))
        local = self._local(outputs, order) if self.settings.alpha < 1 else 0.0
        return GraphPairs(
            node_affinity(cosines(source, target), local, self.settings.alpha),
            self.settings.edge_weight * edge_cosines(source, edges[0], target, edges[1]),
            edges[0],
            edges[1],
            order.argsort(1),
        )

    def _local(self, outputs: Views, order: Tensor) -> Tensor:
        """c^lo (G, n, n)."""
        (source, places), (target, others) = (
            (_at_least_single(self._of_graphs(outputs[f"{name}_q"])), self._of_graphs(outputs[f"{name}_places"]))
            for name in VIEWS
        )
        target, others = _permuted(target, order), _permuted(others, order)
        return local_affinity(source, target, places, others, share=self.settings.matches)

    def _embeddings(self, outputs: Views) -> tuple[Tensor, Tensor]:
        """z of both views (B, F), standardised over all of them if so set."""
        both = _at_least_single(torch.cat([outputs[f"{name}_z"] for name in VIEWS]))
        if self.settings.standardise:
            both = F.batch_norm(both, None, None, training=True)
        first, second = both.chunk(2)
        return first, second

    def _graph_size(self, rows: int) -> tuple[int, int]:
        """Nodes n and neighbours k of the graphs of a batch."""
        nodes = min(self.settings.nodes, rows)
        return nodes, min(self.settings.neighbours, nodes - 1)

    def _of_graphs(self, rows: Tensor) -> Tensor:
        """Rows (B, …) as those of whole graphs, (G, n, …)."""
        nodes, _ = self._graph_size(len(rows))
        return rows[: len(rows) // nodes * nodes].unflatten(0, (-1, nodes))

    def _places(self, affine: Tensor, window: Sequence[int]) -> Tensor:
        """Where the cells of a view lie in its image, (B, P, d)."""
        stride = self.backbone.strides[self.backbone.stage(self.settings.token_stride)]
        counts = [-(-length // step) for length, step in zip(self.size, stride, strict=True)]
        centres = self.backbone.token_grid(counts, self.settings.token_stride).centres(affine.device)
        return places_in_image(centres, affine, window)


def _permuted(nodes: Tensor, order: Tensor) -> Tensor:
    """The nodes (G, n, …) of each graph in the order (G, n)."""
    return nodes.take_along_dim(order.view(*order.shape, *[1] * (nodes.ndim - 2)), 1)


def _at_least_single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
