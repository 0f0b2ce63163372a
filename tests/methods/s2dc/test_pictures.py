"""Pictures of S2DC: cosines with an anchor, principal components as colours."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from nnssl_plugin.methods.s2dc.pictures import (
    anchor_similarity_pictures,
    principal_component_pictures,
    principal_components,
)
from nnssl_plugin.networks.token_grid import TokenGrid


def cells(grid, size):
    """Tokens in the middle of the cells that a grid cuts an image into."""
    spacing = tuple(s // g for s, g in zip(size, grid, strict=True))
    return TokenGrid(grid, tuple((s - 1) / 2 for s in spacing), spacing)


def tokens_of(number, width=6, seed=0):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "grid", "anchor"), [((8, 12, 4), (2, 3, 2), 7), ((10, 6), (5, 3), 0)])
def test_every_voxel_shows_the_cosine_of_its_token_with_the_anchor(size, grid, anchor):
    tokens, image = tokens_of(int(np.prod(grid))), torch.rand(size)
    (_, marked), (_, overlay) = anchor_similarity_pictures(image, tokens, grid=cells(grid, size), anchor=anchor)
    cosines = torch.nn.functional.cosine_similarity(tokens, tokens[anchor], dim=1).reshape(grid)
    for voxel in np.ndindex(*size):
        cell = tuple(v * g // s for v, g, s in zip(voxel, grid, size, strict=True))
        assert float(overlay.values[voxel]) == pytest.approx(float(cosines[cell]), abs=1e-5)
    assert marked.mark == overlay.mark
    cell = np.unravel_index(anchor, grid)
    expected = [c * s / g + (s / g - 1) / 2 for c, s, g in zip(cell, size, grid, strict=True)]
    np.testing.assert_allclose(overlay.mark, expected)


def test_the_token_in_the_middle_is_the_anchor_unless_one_is_named():
    image, tokens = torch.rand(8, 8, 8), tokens_of(64)
    overlay = anchor_similarity_pictures(image, tokens, grid=cells((4, 4, 4), (8, 8, 8)))[1][1]
    named = anchor_similarity_pictures(image, tokens, grid=cells((4, 4, 4), (8, 8, 8)), anchor=2 * 16 + 2 * 4 + 2)[1][1]
    assert torch.equal(overlay.values, named.values) and overlay.mark == named.mark


def test_components_are_scikit_learns_scaled_to_the_whole_range():
    tokens = tokens_of(50)
    expected = PCA(3).fit_transform(tokens.numpy())
    expected = (expected - expected.min(0)) / np.ptp(expected, axis=0)
    ours = principal_components(tokens).numpy()
    for component in range(3):  # scikit-learn's sign follows its largest loading too, but versions differ
        same = np.allclose(ours[:, component], expected[:, component], atol=1e-4)
        assert same or np.allclose(ours[:, component], 1 - expected[:, component], atol=1e-4)


def test_the_sign_follows_the_tokens_and_not_the_solver():
    tokens = tokens_of(50)
    torch.testing.assert_close(principal_components(tokens), principal_components(tokens + 3))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(principal_components(tokens)[order], principal_components(tokens[order]))


@pytest.mark.parametrize("tokens", [torch.ones(8, 5), tokens_of(8, 1), tokens_of(1), tokens_of(2)])
def test_components_that_the_tokens_do_not_have_stay_grey(tokens):
    components = principal_components(tokens)
    assert components.shape == (len(tokens), 3) and torch.isfinite(components).all()
    assert (components[:, 2] == 0.5).all()


def test_colours_lie_over_the_voxels_of_their_tokens():
    tokens, image = tokens_of(12), torch.rand(4, 6)
    (_, grey), (_, colours) = principal_component_pictures(image, tokens, grid=cells((4, 3), (4, 6)))
    assert torch.equal(grey, image) and colours.image.shape == (4, 6, 3)
    components = principal_components(tokens).reshape(4, 3, 3)
    torch.testing.assert_close(colours.image, components.repeat_interleave(2, 1))


def test_strided_tokens_are_marked_and_drawn_where_they_are():
    image, tokens = torch.rand(8, 6), tokens_of(6)
    grid = TokenGrid((2, 3), (0.0, 0.5), (4, 2))
    overlay = anchor_similarity_pictures(image, tokens, grid=grid, anchor=5)[1][1]
    assert overlay.mark == (4.0, 4.5)
    cosines = torch.nn.functional.cosine_similarity(tokens, tokens[5], dim=1)
    for voxel in np.ndindex(8, 6):
        distances = (grid.centres() - torch.tensor(voxel)).square().sum(1)
        nearest = distances.isclose(distances.min())  # half a cell away there are two
        assert min((cosines[nearest] - overlay.values[voxel]).abs()) < 1e-5


def test_tokens_that_are_not_finite_stay_grey_beside_the_others():
    tokens = tokens_of(20)
    spoiled = torch.cat((tokens, torch.full((2, 6), float("nan"), dtype=torch.float64)))
    components = principal_components(spoiled)
    torch.testing.assert_close(components[:20], principal_components(tokens))
    assert (components[20:] == 0.5).all()
    assert (principal_components(torch.full((4, 6), float("inf"))) == 0.5).all()
