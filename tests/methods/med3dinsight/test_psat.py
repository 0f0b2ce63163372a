"""The plane-slice-aware transformer: positions, zero start, what a step changes, and what queries can tell apart."""

import math

import pytest
import torch

from nnssl_plugin.methods.med3dinsight.psat import PlaneSliceAwareTransformer, attention, grid_positions
from nnssl_plugin.nnunet.planes import PLANES


def build(channels=6, embedding_dim=10, **changes):
    torch.manual_seed(0)
    settings = {"dim": 16, "queries": 5, "layers": 2, "heads": 4, "mlp_ratio": 2, "slice_bins": 8} | changes
    return PlaneSliceAwareTransformer(channels, embedding_dim, **settings)


def inputs(batch=3, grid=(2, 3, 2), channels=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, math.prod(grid), channels, generator=generator)
    plane = torch.randint(len(PLANES), (batch,), generator=generator)
    return tokens, grid, plane, torch.rand(batch, generator=generator)


def place(plane, position, batch=3):
    return torch.full((batch,), plane), torch.full((batch,), position)


@pytest.mark.parametrize(("grid", "dim"), [((2, 3, 4), 16), ((5, 7, 5), 12), ((3, 2), 10), ((1, 1, 1), 8)])
def test_positions_equal_a_naive_loop(grid, dim):
    pairs = dim // (2 * len(grid))
    rows = []
    for index in torch.cartesian_prod(*(torch.arange(size) for size in grid)).tolist():
        angles = [[place / 10000 ** (k / pairs) for k in range(pairs)] for place in index]
        row = [part for axis in angles for part in [*map(math.sin, axis), *map(math.cos, axis)]]
        rows.append(row + [0.0] * (dim - len(row)))
    torch.testing.assert_close(grid_positions(grid, dim, "cpu"), torch.tensor(rows))


def test_tokens_of_a_grid_have_different_positions():
    positions = grid_positions((5, 7, 5), 512, "cpu")
    distances = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert distances.min() > 0.5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(2, 3, 2), (1, 1, 1), (3, 5)])
def test_embeddings_are_normalised_float32(batch, grid):
    embedding = build()(*inputs(batch, grid))
    assert embedding.shape == (batch, 10) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(batch))


def test_property_8_zero_start_does_not_know_the_slice():
    psat = build()
    assert (psat.plane_slice == 0).all() and psat.plane_slice.shape == (16, 3, 8)
    tokens, grid, *_ = inputs()
    start = psat(tokens, grid, *place(0, 0.0))
    for plane in range(3):
        for position in (0.0, 0.4, 1.0):
            assert torch.equal(psat(tokens, grid, *place(plane, position)), start)


def test_property_8_a_step_changes_only_the_entries_in_use():
    psat = build()
    tokens, grid, *_ = inputs(batch=2)
    optimiser = torch.optim.Adam(psat.parameters(), lr=0.01)
    plane, position = torch.tensor([1, 2]), torch.tensor([0.3, 1.0])  # bins floor(0.3 · 8) = 2 and, at the end, 7
    psat(tokens, grid, plane, position)[:, 0].sum().backward()
    optimiser.step()
    changed = (psat.plane_slice != 0).any(0)
    expected = torch.zeros(3, 8, dtype=torch.bool)
    expected[1, 2] = expected[2, 7] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("bins", [1, 5, 8, 128])
def test_a_slice_falls_into_the_bin_that_holds_its_position(bins):
    """Bin j holds the positions from j / J up to (j + 1) / J; the last one holds 1 too."""
    psat = build(slice_bins=bins)
    with torch.no_grad():
        psat.plane_slice.copy_(torch.arange(3 * bins, dtype=torch.float32).reshape(1, 3, bins).expand(16, -1, -1))
    seen = {}
    psat.token_norm.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    positions = [*torch.rand(40, generator=torch.Generator().manual_seed(bins)).tolist(), 0.0, 1.0]
    for position in positions:
        expected = next(j for j in range(bins) if position < (j + 1) / bins or j == bins - 1)
        for plane in range(3):
            tokens = torch.zeros(1, 1, 6)
            psat(tokens, (1, 1, 1), *place(plane, position, batch=1))
            added = seen["tokens"] - psat.project_tokens(tokens) - grid_positions((1, 1, 1), 16, "cpu")
            assert added.mean().round().item() == plane * bins + expected, (plane, position)


def test_a_trained_place_tells_slices_apart():
    psat = build()
    with torch.no_grad():
        psat.plane_slice.normal_()
    tokens, grid, *_ = inputs()
    axial, coronal, next_bin, same_bin = (
        psat(tokens, grid, *place(*where)) for where in ((2, 0.3), (0, 0.3), (2, 0.4), (2, 0.26))
    )
    assert not torch.allclose(axial, coronal)
    assert not torch.allclose(axial, next_bin)
    assert torch.equal(axial, same_bin)


def test_the_place_reaches_tokens_and_queries():
    psat = build(layers=1)
    seen = {}
    psat.token_norm.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    psat.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(queries=args[0]))
    tokens, grid, *_ = inputs()
    psat(tokens, grid, *place(1, 0.5))
    before = dict(seen)
    with torch.no_grad():
        psat.plane_slice[:, 1, 4] = 1.0
    psat(tokens, grid, *place(1, 0.5))
    torch.testing.assert_close(seen["tokens"] - before["tokens"], torch.ones_like(seen["tokens"]))
    assert seen["queries"].shape == (3, 5, 16)
    torch.testing.assert_close(seen["queries"], (before["queries"] + 1).expand(3, -1, -1))


def test_attended_output_says_nothing_where_the_volume_says_nothing():
    """Of tokens that are all alike, no place can be read; of others it decides what is read."""
    psat = build(output="attended").double()
    with torch.no_grad():
        psat.plane_slice.normal_()
    tokens, grid, *_ = inputs()
    alike = tokens[:, :1].expand_as(tokens).double()
    places = [place(2, 0.3), place(0, 0.3), place(2, 0.9)]
    first, *others = (psat(alike, grid, *where) for where in places)
    assert all(torch.allclose(first, other, atol=1e-12) for other in others)
    first, *others = (psat(tokens.double(), grid, *where) for where in places)
    assert not any(torch.allclose(first, other, atol=1e-4) for other in others)


def test_residual_output_names_the_place_of_an_empty_volume():
    psat = build()
    with torch.no_grad():
        psat.plane_slice.normal_()
    tokens, grid, *_ = inputs()
    empty = torch.zeros_like(tokens)
    assert not torch.allclose(psat(empty, grid, *place(2, 0.3)), psat(empty, grid, *place(0, 0.3)), atol=1e-2)


def test_attended_output_trains_every_parameter():
    psat = build(output="attended")
    tokens, grid, plane, position = inputs()
    (psat(tokens, grid, plane, position) * torch.randn(3, 10)).sum().backward()
    assert [name for name, p in psat.named_parameters() if p.grad is None] == []


def test_samples_do_not_interact():
    psat = build()
    tokens, grid, plane, position = inputs()
    together = psat(tokens, grid, plane, position)
    for i in range(3):
        alone = psat(tokens[i : i + 1], grid, plane[i : i + 1], position[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])


def test_order_of_tokens_matters_through_their_positions():
    psat = build()
    tokens, grid, plane, position = inputs()
    assert not torch.allclose(psat(tokens.flip(1), grid, plane, position), psat(tokens, grid, plane, position))


def test_queries_start_different_and_equal_ones_would_stay_equal():
    psat = build(queries=300)
    assert psat.queries.std().item() == pytest.approx(0.02, rel=0.05)
    with torch.no_grad():
        psat.queries.copy_(psat.queries[:1].expand(300, -1))
    psat(*inputs())[:, 0].sum().backward()
    torch.testing.assert_close(psat.queries.grad, psat.queries.grad[:1].expand(300, -1))


def test_every_parameter_gets_a_gradient():
    psat = build()
    tokens, grid, plane, position = inputs()
    (psat(tokens, grid, plane, position) * torch.randn(3, 10)).sum().backward()
    missing = [name for name, p in psat.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_autocast_gives_finite_float32():
    psat = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = psat(*inputs())
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, psat(*inputs()), atol=0.05, rtol=0)


@pytest.mark.parametrize("output", ["residual", "attended"])
def test_attention_is_softmax_of_scaled_products_without_its_matrix(output, monkeypatch):
    """Every attention takes PyTorch's scaled_dot_product_attention, and equals the formula with the matrix written."""
    psat = build(output=output).double()
    with torch.no_grad():
        psat.plane_slice.normal_()
    tokens, *where = inputs()
    fused = psat(tokens.double(), *where)
    calls = []

    def written_out(query, key, value, *args, **kwargs):
        calls.append(query.shape)
        return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1) @ value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", written_out)
    torch.testing.assert_close(psat(tokens.double(), *where), fused, rtol=1e-6, atol=1e-6)
    assert len(calls) == 4  # two blocks, to the queries and to the tokens


def test_evaluation_mode_gives_the_same_embeddings():
    psat = build()
    trained = psat(*inputs())
    with torch.no_grad():  # here nn.MultiheadAttention takes another path
        torch.testing.assert_close(psat.eval()(*inputs()), trained.detach())


@pytest.mark.parametrize("same", ["all", "keys and values", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_equals_the_layer(same, batch):
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    torch.nn.init.normal_(layer.in_proj_bias)
    queries, keys, values = (torch.randn(batch, n, 16).double().requires_grad_() for n in (5, 7, 7))
    inputs = {"all": (queries,) * 3, "keys and values": (queries, keys, keys), "none": (queries, keys, values)}[same]
    results = attention(layer, *inputs), layer(*inputs, need_weights=False)[0]
    wanted = [*dict.fromkeys(inputs), *layer.parameters()]
    gradients = [torch.autograd.grad(result.sin().sum(), wanted) for result in results]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_attention_copies_less_than_the_layer():
    layer, x = torch.nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16, requires_grad=True)
    copies = []
    for call in (lambda: attention(layer, x, x, x), lambda: layer(x, x, x, need_weights=False)[0]):
        with torch.profiler.profile() as profile:
            call().sum().backward()
        copies.append(sum(event.count for event in profile.key_averages() if event.key == "aten::copy_"))
    assert copies[0] < copies[1] / 2


def test_the_first_attention_of_the_queries_depends_on_the_place():
    psat, seen = build(layers=1), []
    torch.nn.init.normal_(psat.plane_slice)
    psat.blocks[0].cross_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens, grid, *_ = inputs(batch=1)
    for plane in range(2):
        psat(tokens, grid, *place(plane, 0.0, batch=1))
    moved = (seen[1] - seen[0]) - (psat.plane_slice[:, 1, 0] - psat.plane_slice[:, 0, 0])
    assert moved.abs().amax() > 0.1
