"""Separation of tokens by label: against scikit-learn and naive loops."""

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples

from nnssl_plugin.diagnostics.separation import MOST_TOKENS, cosine_gap, silhouette, token_labels
from nnssl_plugin.networks.token_grid import TokenGrid


def cells(grid, size):
    """Tokens in the middle of the cells that a grid cuts an image into."""
    spacing = tuple(s // g for s, g in zip(size, grid, strict=True))
    return TokenGrid(grid, tuple((s - 1) / 2 for s in spacing), spacing)


@pytest.mark.parametrize(("size", "grid"), [((8, 12), (2, 3)), ((6, 8, 4), (3, 2, 1)), ((4, 4, 4), (4, 4, 4))])
def test_a_token_has_the_label_of_most_of_its_voxels(size, grid):
    segmentation = torch.randint(-1, 4, (2, *size), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    labels = token_labels(segmentation, cells(grid, size).sums)
    assert labels.shape == (2, math.prod(grid)) and labels.dtype == torch.int64
    steps = [s // g for s, g in zip(size, grid, strict=True)]
    for sample in range(2):
        for number, cell in enumerate(product(*map(range, grid))):
            box = tuple(slice(c * s, (c + 1) * s) for c, s in zip(cell, steps, strict=True))
            counts = Counter(segmentation[sample][box].flatten().tolist())
            most = max(counts.values())
            assert labels[sample, number] == min(value for value, count in counts.items() if count == most)


@pytest.mark.parametrize(
    ("size", "counts", "offset", "spacing"),
    [
        ((16, 24), (4, 3), (0.0, 0.0), (4, 8)),
        ((7, 9, 5), (4, 3, 2), (0.0, 1.0, 0.75), (2, 4, 4)),
    ],
)
def test_the_label_is_that_around_the_centre_also_where_cells_leave_the_image(size, counts, offset, spacing):
    segmentation = torch.randint(-1, 4, (2, *size), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    tokens = TokenGrid(counts, offset, spacing)
    labels = token_labels(segmentation, tokens.sums)
    for sample, (number, centre) in product(range(2), enumerate(tokens.centres().tolist())):
        shares = Counter()
        for voxel in np.ndindex(*size):
            lengths = [
                max(0.0, min(v + 0.5, c + s / 2) - max(v - 0.5, c - s / 2))
                for v, c, s in zip(voxel, centre, spacing, strict=True)
            ]
            shares[int(segmentation[sample][voxel])] += math.prod(lengths)
        most = max(shares.values())
        assert labels[sample, number] == min(value for value, share in shares.items() if share == most)


def naive_gap(tokens, labels):
    same, different = [], []
    for i, j in combinations([n for n in range(len(labels)) if labels[n] >= 0], 2):
        cosine = float(tokens[i] @ tokens[j] / tokens[i].norm() / tokens[j].norm())
        (same if labels[i] == labels[j] else different).append(cosine)
    return np.mean(same) - np.mean(different)


def test_the_gap_is_the_mean_over_pairs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 4, (40,), generator=generator)
    tokens += labels[:, None]
    assert float(cosine_gap(tokens, labels)) == pytest.approx(naive_gap(tokens, labels), abs=1e-6)
    assert float(cosine_gap(3 * tokens, labels)) == pytest.approx(naive_gap(tokens, labels), abs=1e-6)


def test_orthogonal_structures_have_the_gap_of_one_and_opposite_ones_of_two():
    labels = torch.tensor([0, 0, 5, 5, -1])
    axes = torch.eye(2)[[0, 0, 1, 1, 0]]
    assert float(cosine_gap(axes, labels)) == pytest.approx(1)
    assert float(cosine_gap(torch.tensor([[1.0], [2.0], [-1.0], [-3.0], [1.0]]), labels)) == pytest.approx(2)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 2], [-1, -1, -1], [-1, -1, 2]])
def test_without_pairs_of_both_kinds_there_is_no_gap(labels):
    assert torch.isnan(cosine_gap(torch.randn(3, 4), torch.tensor(labels)))


def test_the_silhouette_is_scikit_learns_over_known_labels():
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(-1, 3, (60,), generator=generator)
    tokens = torch.randn(60, 5, generator=generator) + 2 * torch.nn.functional.one_hot(labels.clamp(min=0), 5)
    known = labels >= 0
    expected = silhouette_samples(tokens[known].numpy(), labels[known].numpy(), metric="cosine").mean()
    assert silhouette(tokens, labels) == pytest.approx(expected, abs=1e-5)
    assert silhouette(tokens, torch.randint(0, 3, (60,), generator=generator)) < silhouette(tokens, labels)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 2], [-1, -1, -1], [-1, 0, 2]])
def test_without_two_labels_and_a_pair_there_is_no_silhouette(labels):
    assert math.isnan(silhouette(torch.randn(3, 4), torch.tensor(labels)))


def test_many_tokens_are_sampled_alike_each_time():
    number = MOST_TOKENS + 100
    labels = torch.arange(number) % 2
    tokens = torch.stack((labels, 1 - labels), 1).float()
    tokens[: number // 10] += 1
    assert silhouette(tokens, labels) == silhouette(tokens, labels) > 0.5
