"""Affinities of the nodes of two graphs, and the message passing before them (sections 3.2.1 and 3.2.2).

Shapes: G pairs of graphs with n nodes each; P cells of a feature map with D channels, d spatial dimensions.
"""

import torch
from torch import Tensor, nn

LEAST_NORM = 1e-6
"""A shorter vector has no direction: its cosines are 0, without gradient."""


class GraphConvolution(nn.Module):
    """g_ε of Eq. 1: layers H ← σ(D̃^(-1/2) (A + I) D̃^(-1/2) H g), the last one without σ.

    D̃ holds the degrees of A + I, as in Kipf and Welling; those of A alone, as printed, would leave the sums unbounded.

    Args:
        dim: width F of all layers.
        layers: their number; with 0 the features stay as they are.
        residual: whether the features are added to what the layers give.
    """

    def __init__(self, dim: int, layers: int, *, residual: bool):
        super().__init__()
        self.residual = residual and layers > 0
        self.weights = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        """Ẑ (G, n, F) of the node features X (G, n, F) and the edges (G, E, 2)."""
        passing = normalised_adjacency(edges, features.shape[1]).to(features.dtype)
        passed = features
        for number, weight in enumerate(self.weights):
            passed = passing @ weight(passed)
            if number < len(self.weights) - 1:
                passed = passed.relu()
        return features + passed if self.residual else passed


def normalised_adjacency(edges: Tensor, nodes: int) -> Tensor:
    """D̃^(-1/2) (A + I) D̃^(-1/2) of directed edges (G, E, 2), each of which counts in both directions: (G, n, n)."""
    adjacency = torch.eye(nodes, device=edges.device).repeat(len(edges), 1, 1).flatten(1)
    for tails, heads in (edges.unbind(-1), edges.flip(-1).unbind(-1)):
        adjacency.scatter_(1, tails * nodes + heads, 1.0)
    adjacency = adjacency.view(-1, nodes, nodes)
    scale = adjacency.sum(-1).rsqrt()
    return scale[:, :, None] * adjacency * scale[:, None, :]


def node_affinity(globally: Tensor, locally: Tensor, alpha: float) -> Tensor:
    """c^v of Eq. 3, in [-1, 1]: α c^gl + (1 − α) c^lo, c^lo the mean of both directions."""
    return alpha * globally + (1 - alpha) * locally


def cosines(source: Tensor, target: Tensor) -> Tensor:
    """cos of every pair: (..., n, D) and (..., m, D) give (..., n, m)."""
    return _unit(source) @ _unit(target).mT


def local_affinity(
    source: Tensor, target: Tensor, source_places: Tensor, target_places: Tensor, *, share: float
) -> Tensor:
    """c^lo of Eq. 2 of every pair of nodes, both directions, in [-1, 1].

    In each direction the mean, over the cells of one view, of the cosine with the cell of the other that is nearest by
    place, and of that with the cell that is nearest by feature; of each kind the ``share`` of the cells with the
    nearest matches counts (``select_top`` of the pseudo-code, which also takes the mean of both kinds).

    Args:
        source, target: features of the cells (G, n, P, D).
        source_places, target_places: where they lie in their image, (G, n, P, d).
        share: γ as a share of the cells, in (0, 1].

    Returns:
        (G, n, n).
    """
    graphs, nodes, cells = source.shape[:3]
    shape = (graphs, nodes, cells, nodes, cells)
    similarity = cosines(source.flatten(1, 2), target.flatten(1, 2)).view(shape)
    with torch.no_grad():
        by_place = torch.cdist(
            source_places.flatten(1, 2), target_places.flatten(1, 2), compute_mode="donot_use_mm_for_euclid_dist"
        ).view(shape)
        by_feature = _distances(source, target, similarity)
    count = max(1, round(share * cells))
    found = [
        (_matched(similarity, distance, count) + _matched(_turned(similarity), _turned(distance), count).mT) / 2
        for distance in (by_place, by_feature)
    ]
    return (found[0] + found[1]) / 2


def _matched(similarity: Tensor, distance: Tensor, count: int) -> Tensor:
    """Mean similarity (G, n, n) of the cells of a source view with their nearest cells in each target view, over the
    ``count`` pairs that are nearest. Both arguments (G, n, P, n, P)."""
    nearest = distance.min(-1)
    kept = nearest.values.topk(count, dim=2, largest=False).indices
    matched = similarity.gather(-1, nearest.indices[..., None])[..., 0]
    return matched.gather(2, kept).mean(2)


def _turned(pairs: Tensor) -> Tensor:
    """The same pairs of cells with the target's first."""
    return pairs.permute(0, 3, 4, 1, 2)


def _distances(source: Tensor, target: Tensor, similarity: Tensor) -> Tensor:
    """Squared Euclidean distances of the features of all cells, (G, n, P, n, P)."""
    lengths = [torch.linalg.vector_norm(cells, dim=-1) for cells in (source, target)]
    first, second = lengths[0][:, :, :, None, None], lengths[1][:, None, None]
    return first.square() + second.square() - 2 * first * second * similarity


def _unit(vectors: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norm <= LEAST_NORM, 0.0, vectors / norm.clamp(min=LEAST_NORM))  # a NaN stays one
