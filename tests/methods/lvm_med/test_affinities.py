"""Affinities and message passing against loops beside the paper's equations (property 6 of the method's checks)."""

import pytest
import torch
import torch.nn.functional as F
from method_checks import assert_equals_naive_loop

from nnssl_plugin.methods.lvm_med.affinities import (
    GraphConvolution,
    cosines,
    local_affinity,
    node_affinity,
    normalised_adjacency,
)
from nnssl_plugin.objectives.graph_matching import nearest_neighbour_edges

GRAPHS, NODES, CELLS, WIDTH = 2, 4, 6, 5


def cells_of_two_views(generator):
    shapes = ((WIDTH,), (WIDTH,), (2,), (2,))
    shapes = ((GRAPHS, NODES, CELLS, *shape) for shape in shapes)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def naive_one_way(source, target, places, others, count):
    """c^lo(i → a) of one pair of views: the pseudo-code's local_cost, a cell at a time."""
    total = 0
    for distance in (torch.cdist(places, others), torch.cdist(source, target)):
        pairs = sorted((row.min().item(), p, int(row.argmin())) for p, row in enumerate(distance))
        total = total + sum(F.cosine_similarity(source[p], target[q], dim=0) for _, p, q in pairs[:count]) / count
    return 0.5 * total


def naive_local(source, target, places, others, count):
    rows = []
    for g in range(GRAPHS):
        for i in range(NODES):
            for a in range(NODES):
                there = naive_one_way(source[g, i], target[g, a], places[g, i], others[g, a], count)
                back = naive_one_way(target[g, a], source[g, i], others[g, a], places[g, i], count)
                rows.append((there + back) / 2)
    return torch.stack(rows).view(GRAPHS, NODES, NODES)


@pytest.mark.parametrize("share, count", [(1.0, 6), (0.41, 2), (0.01, 1)])
def test_the_local_affinity_is_equation_2(share, count):
    assert_equals_naive_loop(
        lambda *x: local_affinity(*x, share=share), lambda *x: naive_local(*x, count), cells_of_two_views, seeds=[0]
    )


def test_equation_3_stays_in_its_range_and_two_equal_views_have_affinity_1():
    source, target, places, others = cells_of_two_views(torch.Generator().manual_seed(1))
    globally = cosines(source.mean(2), target.mean(2))
    affinity = node_affinity(globally, local_affinity(source, target, places, others, share=0.5), 0.8)
    assert affinity.abs().max() <= 1 + 1e-9
    torch.testing.assert_close(globally[0, 1, 2], F.cosine_similarity(source[0, 1].mean(0), target[0, 2].mean(0), 0))
    same = local_affinity(source, source, places, places, share=1.0).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(same, torch.ones_like(same))


def test_mirrored_cells_with_mirrored_places_are_the_same_view():
    source, _, places, _ = cells_of_two_views(torch.Generator().manual_seed(2))
    same = local_affinity(source, source.flip(2), places, places.flip(2), share=1.0).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(same, torch.ones_like(same))


def test_cells_without_direction_have_no_affinity_and_finite_gradients():
    source = torch.zeros(1, 2, 3, 4, requires_grad=True)
    places = torch.rand(1, 2, 3, 2)
    affinity = local_affinity(source, source, places, places, share=0.5)
    affinity.sum().backward()
    assert affinity.eq(0).all() and source.grad.isfinite().all()


def naive_convolution(features, edges, weights):
    """Eq. 1 of one graph at a time, a node at a time."""
    results = []
    for x, pairs in zip(features, edges.tolist(), strict=True):
        joined = [{i} for i in range(len(x))]
        for i, j in pairs:
            joined[i].add(j)
            joined[j].add(i)
        for layer, weight in enumerate(weights):
            mixed = [
                sum(x[j] / (len(joined[i]) * len(joined[j])) ** 0.5 for j in sorted(joined[i])) for i in range(len(x))
            ]
            x = torch.stack(mixed) @ weight.T
            x = x.relu() if layer + 1 < len(weights) else x
        results.append(x)
    return torch.stack(results)


def test_message_passing_is_equation_1():
    torch.manual_seed(0)
    layers = GraphConvolution(WIDTH, 2, residual=False).double()
    weights = [weight.weight for weight in layers.weights]
    edges = nearest_neighbour_edges(torch.randn(3, 7, WIDTH), 2)

    def draw(generator):
        return [torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64)]

    assert_equals_naive_loop(lambda x: layers(x, edges), lambda x: naive_convolution(x, edges, weights), draw)
    features = torch.randn(3, 7, WIDTH).double()
    passed = layers(features, edges)
    layers.residual = True
    torch.testing.assert_close(layers(features, edges), features + passed)
    assert GraphConvolution(WIDTH, 0, residual=True)(features, edges) is features


def test_a_node_without_neighbours_passes_to_itself_alone():
    none = torch.zeros(2, 0, 2, dtype=torch.long)
    assert torch.equal(normalised_adjacency(none, 3), torch.eye(3).expand(2, 3, 3))
