"""Random pairs of graphs for the tests of matching, and the best matching by trying every permutation."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_plugin.objectives.graph_matching import edge_cosines, gumbel_noise, nearest_neighbour_edges


def graph_pairs(
    graphs: int, nodes: int, *, neighbours: int = 3, apart: float = 0.3, noise: float = 0.0, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of ``match_graphs`` in float64, and the true matching (G, n).

    Both graphs are ``apart`` from the same random features of 8 dimensions; the nodes of the target are permuted.
    """
    generator = torch.Generator().manual_seed(seed)
    centre, *offsets = torch.randn(3, graphs, nodes, 8, dtype=torch.float64, generator=generator)
    source, target = (centre + apart * offset for offset in offsets)
    order = torch.stack([torch.randperm(nodes, generator=generator) for _ in range(graphs)])
    target = target.gather(1, order[..., None].expand_as(target))
    edges = [nearest_neighbour_edges(features, neighbours) for features in (source, target)]
    node = F.normalize(source, dim=-1) @ F.normalize(target, dim=-1).mT
    edge = edge_cosines(source, edges[0], target, edges[1])
    arguments = {
        "node_affinity": node + noise * gumbel_noise(tuple(node.shape), generator),
        "edge_affinity": edge + noise * gumbel_noise(tuple(edge.shape), generator),
        "edges_source": edges[0],
        "edges_target": edges[1],
    }
    return arguments, order.argsort(1)


def naive_affinity(permutation: list[int], node: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Eq. 4 of one graph, as loops over nodes and pairs of edges."""
    total = sum(node[i, a] for i, a in enumerate(permutation))
    for e, (i, j) in enumerate(source.tolist()):
        for f, (a, b) in enumerate(target.tolist()):
            if permutation[i] == a and permutation[j] == b:
                total = total + edge[e, f]
    return total


def every_affinity(
    node_affinity: Tensor, edge_affinity: Tensor, edges_source: Tensor, edges_target: Tensor
) -> tuple[Tensor, Tensor]:
    """The affinity of every permutation, with gradient: permutations (n!, n), affinities (G, n!)."""
    n = node_affinity.shape[-1]
    permutations = torch.tensor(list(itertools.permutations(range(n))))
    nodes = node_affinity[:, torch.arange(n), permutations].sum(-1)
    affinities = []
    for edge, source, target in zip(edge_affinity, edges_source, edges_target, strict=True):
        where = torch.full((n, n), len(target))
        where[target[:, 0], target[:, 1]] = torch.arange(len(target))
        matched = where[permutations[:, source[:, 0]], permutations[:, source[:, 1]]]  # (n!, Eₛ)
        affinities.append(F.pad(edge, (0, 1))[torch.arange(len(source)), matched].sum(-1))
    return permutations, nodes + torch.stack(affinities)


def brute_force(**arguments: Tensor) -> tuple[Tensor, Tensor]:
    """The best matching (G, n) and its affinity (G,)."""
    permutations, affinities = every_affinity(**arguments)
    value, first = affinities.max(1)
    return permutations[first], value
