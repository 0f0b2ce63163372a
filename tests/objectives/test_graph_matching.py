"""Graph matching against every permutation, pygmtools and naive loops (properties 1 to 7 of the method's checks)."""

import itertools
from types import SimpleNamespace

import pygmtools
import pytest
import torch
from graph_instances import brute_force, every_affinity, graph_pairs, naive_affinity
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.objectives.assignment import linear_assignment
from nnssl_plugin.objectives.graph_matching import (
    _GraphMatching,
    _pair_affinity,
    _shift_decides,
    edge_cosines,
    edge_matches,
    graph_matching,
    gumbel_noise,
    hamming_loss,
    match_graphs,
    matching_affinity,
    nearest_neighbour_edges,
)
from nnssl_plugin.objectives.quadratic_assignment import QuadraticProblem, ascend, frank_wolfe, tabu_search


def permute_target(arguments: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The same graphs, whose target node a is called ``order[a]``."""
    renamed = order[arguments["edges_target"]]
    return arguments | {"node_affinity": arguments["node_affinity"][:, :, order.argsort()], "edges_target": renamed}


def gradients(arguments: dict[str, Tensor], loss, **settings) -> tuple[Tensor, Tensor, Tensor]:
    """ṽ, ∂L/∂c^v, ∂L/∂c^e."""
    node, edge = (arguments[name].clone().requires_grad_() for name in ("node_affinity", "edge_affinity"))
    matching = graph_matching(node, edge, arguments["edges_source"], arguments["edges_target"], **settings)
    loss(matching).backward()
    return matching.detach(), node.grad, edge.grad


# --- the solver -------------------------------------------------------------------------------------------------------


def test_affinity_is_that_of_a_naive_loop():
    arguments, _ = graph_pairs(3, 5)
    permutation = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    value = matching_affinity(permutation, **arguments)
    for g, graph in enumerate(zip(*arguments.values(), strict=True)):
        torch.testing.assert_close(value[g], naive_affinity(permutation[g].tolist(), *graph))
    pair = _pair_affinity(arguments["edge_affinity"], arguments["edges_source"], arguments["edges_target"], 5)
    problem = QuadraticProblem(arguments["node_affinity"], pair)
    torch.testing.assert_close(problem.value(permutation[:, None])[:, 0], value)
    torch.testing.assert_close(pair, pair.mT)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_property_2_is_the_best_of_all_permutations(nodes, noise):
    arguments, _ = graph_pairs(12, nodes, noise=noise, seed=nodes)
    best, value = brute_force(**arguments)
    found = match_graphs(**arguments)
    assert torch.equal(found, best)
    torch.testing.assert_close(matching_affinity(found, **arguments), value)


def test_is_within_a_per_cent_of_the_best_of_eight_nodes_with_much_noise():
    arguments, _ = graph_pairs(8, 8, noise=0.3, apart=1.0)
    _, best = brute_force(**arguments)
    found = matching_affinity(match_graphs(**arguments), **arguments)
    assert (found <= best + 1e-9).all()
    assert ((best - found) / best).mean() < 0.01


@pytest.mark.parametrize("nodes", [2, 6, 16])
def test_property_1_identical_graphs_are_matched_with_themselves_under_any_names(nodes):
    arguments, truth = graph_pairs(6, nodes, apart=0.0, neighbours=5)
    found = match_graphs(**arguments)
    assert torch.equal(found, truth)
    largest = nodes + arguments["edges_source"].shape[1]  # every cosine is 1
    torch.testing.assert_close(matching_affinity(found, **arguments), torch.full((6,), float(largest)).double())


def test_renamed_nodes_give_the_renamed_matching():
    arguments, _ = graph_pairs(10, 12, noise=0.1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(match_graphs(**permute_target(arguments, order)), order[match_graphs(**arguments)])


@pytest.mark.parametrize("solver", ["fw", "lap"])
def test_property_2_without_edges_it_is_linear_assignment(solver):
    arguments, _ = graph_pairs(10, 9, noise=1.0)
    expected = linear_assignment(arguments["node_affinity"])
    without = arguments | {"edge_affinity": torch.zeros_like(arguments["edge_affinity"])}
    assert torch.equal(match_graphs(**without, solver=solver), expected)
    none = arguments["edges_source"][:, :0]
    no_edges = {"edge_affinity": arguments["edge_affinity"][:, :0, :0], "edges_source": none, "edges_target": none}
    assert torch.equal(match_graphs(**(arguments | no_edges), solver=solver), expected)
    assert torch.equal(match_graphs(**arguments, solver="lap"), expected)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_property_3_always_a_permutation_and_never_below_the_start(noise):
    arguments, _ = graph_pairs(20, 16, noise=noise, apart=1.0, neighbours=5)
    start = torch.arange(15, -1, -1).expand(20, 16)
    found = match_graphs(**arguments, start=start)
    assert torch.equal(found.sort(1).values, torch.arange(16).expand(20, 16))
    value = matching_affinity(found, **arguments)
    for lower in (start, linear_assignment(arguments["node_affinity"])):
        assert (value >= matching_affinity(lower, **arguments) - 1e-9).all()


@pytest.mark.parametrize("search", [ascend, tabu_search])
def test_searches_keep_count_of_the_objective_and_never_lose(search):
    arguments, _ = graph_pairs(5, 9, noise=0.5)
    edge, source, target = (arguments[name] for name in ("edge_affinity", "edges_source", "edges_target"))
    problem = QuadraticProblem(arguments["node_affinity"], _pair_affinity(edge, source, target, 9))
    starts = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s)) for s in range(15)])
    starts = starts.view(5, 3, 9)
    values = [problem.value(search(problem, starts, steps)) for steps in (0, 1, 5, 30)]
    torch.testing.assert_close(values[0], problem.value(starts))
    assert all((later >= earlier - 1e-9).all() for earlier, later in itertools.pairwise(values))
    assert (values[-1] > values[0]).all()


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_search_goes_on_where_every_swap_is_forbidden(nodes):
    arguments, _ = graph_pairs(20, nodes, noise=1.0)
    pair = _pair_affinity(arguments["edge_affinity"], arguments["edges_source"], arguments["edges_target"], nodes)
    problem = QuadraticProblem(arguments["node_affinity"], pair)
    starts = torch.arange(nodes).expand(20, 1, nodes)
    torch.testing.assert_close(problem.value(tabu_search(problem, starts, 20))[:, 0], brute_force(**arguments)[1])


def test_no_swap_improves_the_end_of_the_ascent():
    arguments, _ = graph_pairs(4, 6, noise=1.0)
    edge, source, target = (arguments[name] for name in ("edge_affinity", "edges_source", "edges_target"))
    problem = QuadraticProblem(arguments["node_affinity"], _pair_affinity(edge, source, target, 6))
    found = ascend(problem, torch.arange(6).expand(4, 1, 6), 40).squeeze(1)
    value = matching_affinity(found, **arguments)
    for i, j in torch.combinations(torch.arange(6)).tolist():
        swapped = found.clone()
        swapped[:, [i, j]] = found[:, [j, i]]
        assert (matching_affinity(swapped, **arguments) <= value + 1e-9).all()


def test_frank_wolfe_stays_doubly_stochastic_and_climbs():
    arguments, _ = graph_pairs(6, 10, noise=0.5)
    edge, source, target = (arguments[name] for name in ("edge_affinity", "edges_source", "edges_target"))
    pair = _pair_affinity(edge, source, target, 10)
    problem = QuadraticProblem(arguments["node_affinity"], pair)
    last = torch.full((6,), -torch.inf).double()
    for steps in (0, 1, 2, 5, 10):
        v = frank_wolfe(problem, steps)
        for dim in (1, 2):
            torch.testing.assert_close(v.sum(dim), torch.ones(6, 10).double())
        assert v.min() > -1e-12
        flat = v.flatten(1)
        value = (flat * arguments["node_affinity"].flatten(1)).sum(1) + torch.einsum(
            "gi,gij,gj->g", flat, pair, flat
        ) / 2
        assert (value >= last - 1e-9).all()
        last = value


@pytest.mark.parametrize("solver", ["sm", "ipfp", "rrwm"])
def test_pygmtools_finds_nothing_better(solver):
    arguments, _ = graph_pairs(10, 10, noise=0.3, neighbours=4)
    edge, source, target = (arguments[name] for name in ("edge_affinity", "edges_source", "edges_target"))
    # rows and columns are (target, source) there
    matrix = (
        _pair_affinity(edge, source, target, 10).view(-1, 10, 10, 10, 10).permute(0, 2, 1, 4, 3).reshape(-1, 100, 100)
    )
    matrix = matrix / 2 + torch.diag_embed(arguments["node_affinity"].mT.flatten(1))
    counts = torch.full((10,), 10)
    shift = -matrix.amin()
    soft = getattr(pygmtools, solver)(matrix + shift, counts, counts, backend="pytorch")
    hard = pygmtools.hungarian(soft, backend="pytorch")
    theirs = matching_affinity(hard.argmax(2), **arguments)
    torch.testing.assert_close(pygmtools.utils.compute_affinity_score(hard, matrix, backend="pytorch"), theirs)
    ours = matching_affinity(match_graphs(**arguments), **arguments)
    assert (ours >= theirs - 1e-6).all()


def test_property_7_a_constant_on_nodes_changes_nothing_and_one_on_edges_does():
    arguments, _ = graph_pairs(20, 8, noise=0.5, apart=1.0)
    found = match_graphs(**arguments)
    assert torch.equal(match_graphs(**(arguments | {"node_affinity": arguments["node_affinity"] + 3})), found)
    preserved = edge_matches(found, arguments["edges_source"], arguments["edges_target"]).sum()
    rewarded = match_graphs(**(arguments | {"edge_affinity": arguments["edge_affinity"] + 3}))
    assert edge_matches(rewarded, arguments["edges_source"], arguments["edges_target"]).sum() > preserved


def test_batches_give_what_single_graphs_give(monkeypatch):
    arguments, _ = graph_pairs(7, 9, noise=0.3)
    found = match_graphs(**arguments)
    single = [match_graphs(**{name: x[g : g + 1] for name, x in arguments.items()}) for g in range(7)]
    assert torch.equal(found, torch.cat(single))
    monkeypatch.setattr("nnssl_plugin.objectives.graph_matching.CACHED", 3 * 9**4)
    assert torch.equal(found, match_graphs(**arguments, start=found))
    assert match_graphs(**{name: x[:0] for name, x in arguments.items()}).shape == (0, 9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["node_affinity", "edge_affinity"])
def test_what_is_not_finite_counts_as_zero_and_other_graphs_do_not_see_it(bad, name):
    arguments, _ = graph_pairs(3, 6)
    broken = arguments[name].clone()
    broken[1, 2] = bad
    zero = arguments[name].clone()
    zero[1, 2] = 0
    assert torch.equal(match_graphs(**(arguments | {name: broken})), match_graphs(**(arguments | {name: zero})))
    everything = torch.full_like(arguments[name], bad)
    found = match_graphs(**(arguments | {name: everything}))
    assert torch.equal(found.sort(1).values, torch.arange(6).expand(3, 6))


def test_identical_nodes_give_a_permutation_and_no_gradient():
    features = torch.ones(2, 6, 4, dtype=torch.float64, requires_grad=True)
    edges = nearest_neighbour_edges(features, 3)
    edge = edge_cosines(features, edges, features, edges)
    assert not edge.any()
    found = match_graphs(features @ features.mT, edge, edges, edges)
    assert torch.equal(found.sort(1).values, torch.arange(6).expand(2, 6))
    edge.sum().backward()
    assert not features.grad.any()


def test_precisions_agree_and_autocast_does_not_reach_it():
    arguments, _ = graph_pairs(8, 10, noise=0.05, neighbours=5)
    expected = match_graphs(**arguments)
    kinds = {name: x.float() if x.is_floating_point() else x for name, x in arguments.items()}
    assert torch.equal(match_graphs(**kinds), expected)
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in arguments.items()}
    wide = {name: x.float() if x.is_floating_point() else x for name, x in half.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match_graphs(**half), match_graphs(**wide))
        _, node_gradient, edge_gradient = gradients(half, lambda v: v.square().sum() - v[:, 0, 0].sum(), strength=1.0)
        matching = graph_matching(**half, strength=80.0)
    assert matching.dtype == torch.float32
    assert node_gradient.dtype == edge_gradient.dtype == torch.bfloat16
    mixed = arguments | {"edge_affinity": arguments["edge_affinity"].float()}
    assert torch.equal(match_graphs(**mixed), expected)
    whole = {name: x.mul(9).long() if x.is_floating_point() else x for name, x in arguments.items()}
    as_float = {name: x.float() if "affinity" in name else x for name, x in whole.items()}
    assert torch.equal(match_graphs(**whole), match_graphs(**as_float))


@pytest.mark.slow
def test_reads_nothing_on_the_host_of_a_gpu(monkeypatch):
    monkeypatch.setattr("nnssl_plugin.objectives.assignment._has_triton", lambda: False)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        features, truth = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.long)
        edges = nearest_neighbour_edges(features, 2)
        arguments = features @ features.mT, edge_cosines(features, edges, features, edges), edges, edges
        assert hamming_loss(graph_matching(*arguments, strength=80.0), truth).shape == (2,)
        # autograd's engine wants a real device: the backward pass alone
        saved = SimpleNamespace(
            saved_tensors=(*arguments, truth), strength=80.0, solver="fw", needs_input_grad=(True, True)
        )
        of_nodes, of_edges, *_ = _GraphMatching.backward(saved, torch.randn(2, 4, 4))
        assert (of_nodes.shape, of_edges.shape) == ((2, 4, 4), (2, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("nodes", [2, 7, 16, 33])
def test_a_gpu_finds_what_a_cpu_finds(nodes):
    arguments, _ = graph_pairs(8, nodes, noise=0.1)
    found = match_graphs(**{name: x.cuda() for name, x in arguments.items()}).cpu()
    values = [matching_affinity(p, **arguments) for p in (found, match_graphs(**arguments))]
    torch.testing.assert_close(*values)


def test_what_does_not_fit_is_refused():
    arguments, _ = graph_pairs(2, 5)
    with pytest.raises(ValueError, match="solver must be one of fw, lap, not 'simplex'"):
        match_graphs(**arguments, solver="simplex")
    with pytest.raises(ValueError, match="node_affinity"):
        match_graphs(**(arguments | {"node_affinity": torch.zeros(2, 5, 4)}))
    with pytest.raises(ValueError, match="edge_affinity"):
        match_graphs(**(arguments | {"edge_affinity": torch.zeros(15, 15)}))
    with pytest.raises(ValueError, match="edges_target"):
        match_graphs(**(arguments | {"edges_target": arguments["edges_target"][:, :-1]}))
    with pytest.raises(ValueError, match="strength must be above 0, not 0"):
        graph_matching(**arguments, strength=0)
    with pytest.raises(ValueError, match="edge_noise"):
        graph_matching(**arguments, strength=1, edge_noise=torch.zeros(10, 3, 14))


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [2.0, 10.0, 80.0])
def test_gradient_is_that_of_the_finite_difference(strength, monkeypatch):
    """Eq. 6 is the gradient of (max⟨θ, v⟩ − max⟨θ − λ ∂L/∂ṽ, v⟩)/λ, with a solver that tries all permutations."""

    def exact(node, edge, source, target, **_):
        return brute_force(node_affinity=node, edge_affinity=edge, edges_source=source, edges_target=target)[0]

    monkeypatch.setattr("nnssl_plugin.objectives.graph_matching.match_graphs", exact)
    arguments, _ = graph_pairs(6, 5, noise=0.5, apart=1.0)
    weights = torch.rand(6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weights = weights / weights.abs().amax((1, 2), keepdim=True)  # ∂L/∂ṽ
    _, node_gradient, edge_gradient = gradients(arguments, lambda v: (v * weights).sum(), strength=strength)
    node, edge = (arguments[name].clone().requires_grad_() for name in ("node_affinity", "edge_affinity"))
    edges = arguments["edges_source"], arguments["edges_target"]
    largest = every_affinity(node, edge, *edges)[1].amax(1)
    largest_shifted = every_affinity(node - strength * weights, edge, *edges)[1].amax(1)
    ((largest - largest_shifted).sum() / strength).backward()
    torch.testing.assert_close(node_gradient, node.grad)
    torch.testing.assert_close(edge_gradient, edge.grad)
    assert node_gradient.any() and edge_gradient.any()


def test_property_5_gradient_with_a_large_strength_is_that_of_a_structured_perceptron():
    arguments, truth = graph_pairs(9, 10, noise=0.5, apart=1.5)
    matching, node_gradient, edge_gradient = gradients(arguments, lambda v: hamming_loss(v, truth).sum(), strength=80.0)
    true = torch.nn.functional.one_hot(truth, 10).double()
    torch.testing.assert_close(node_gradient, (matching - true) / 80)
    source, target = arguments["edges_source"], arguments["edges_target"]
    found = matching.argmax(2)
    difference = edge_matches(found, source, target).double() - edge_matches(truth, source, target).double()
    torch.testing.assert_close(edge_gradient, difference / 80)
    for dim in (1, 2):
        assert not node_gradient.sum(dim).any()
    wrong = (found != truth).any(1)
    assert wrong.any()
    assert torch.equal(node_gradient.flatten(1).any(1), wrong)
    stepped = arguments["node_affinity"] - node_gradient
    margin = ((stepped - arguments["node_affinity"]) * (true - matching)).sum((1, 2))
    assert (margin[wrong] > 0).all() and not margin[~wrong].any()


def test_property_8_gradients_of_two_large_strengths_have_one_direction():
    arguments, truth = graph_pairs(5, 8, noise=0.5, apart=1.5)
    of = [gradients(arguments, lambda v: hamming_loss(v, truth).sum(), strength=s)[1] * s for s in (60.0, 120.0)]
    torch.testing.assert_close(*of)


@pytest.mark.parametrize("factor", [1e-3, 65536.0])
@pytest.mark.parametrize("strength", [0.7, 80.0])
def test_gradient_follows_the_scale_of_the_loss(factor, strength):
    arguments, truth = graph_pairs(5, 6, noise=0.5, apart=1.5)
    plain = gradients(arguments, lambda v: hamming_loss(v, truth).sum(), strength=strength)
    scaled = gradients(arguments, lambda v: factor * hamming_loss(v, truth).sum(), strength=strength)
    for one, other in zip(plain[1:], scaled[1:], strict=True):
        torch.testing.assert_close(factor * one, other)


def test_the_second_problem_is_left_out_where_the_bound_proves_its_result(monkeypatch):
    arguments, truth = graph_pairs(6, 8, noise=0.05)
    loss = {"loss": lambda v: hamming_loss(v, truth).sum()}
    proven = gradients(arguments, **loss, strength=80.0)
    calls = []
    module = "nnssl_plugin.objectives.graph_matching"

    def counted(*args, **settings):
        calls.append(settings)
        return match_graphs(*args, **settings)

    monkeypatch.setattr(f"{module}.match_graphs", counted)
    gradients(arguments, **loss, strength=80.0)
    assert len(calls) == 1
    gradients(arguments, **loss, strength=0.1)
    assert len(calls) == 3
    monkeypatch.setattr(f"{module}._shift_decides", lambda node, *_: torch.zeros(len(node), dtype=torch.bool))
    solved = gradients(arguments, **loss, strength=80.0)
    assert len(calls) == 5
    for one, other in zip(proven, solved, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["hamming", "random"])
def test_the_bound_never_proves_what_is_wrong(kind):
    arguments, truth = graph_pairs(40, 5, noise=0.5, apart=1.0)
    node, edge = arguments["node_affinity"], arguments["edge_affinity"]
    direction = 1 - 2 * torch.nn.functional.one_hot(truth, 5).double()
    if kind == "random":
        direction += torch.rand(direction.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    decided = 0
    for strength in (1, 3, 6, 9, 12, 20, 60, 1000):
        proven = _shift_decides(node, edge, arguments["edges_source"], strength * direction)
        best, _ = brute_force(**(arguments | {"node_affinity": node - strength * direction}))
        assert torch.equal(best[proven], direction.argmin(-1)[proven])
        decided += int(proven.sum())
    assert 0 < decided < 8 * 40


@pytest.mark.parametrize("name", ["node_affinity", "edge_affinity"])
def test_a_graph_that_is_not_finite_gives_nan_so_that_the_step_is_skipped(name):
    arguments, truth = graph_pairs(3, 6)
    arguments[name][1, 2, 3] = torch.nan
    matching, node_gradient, edge_gradient = gradients(
        arguments, lambda v: hamming_loss(v, truth).nansum(), strength=80.0
    )
    for values in (matching, node_gradient, edge_gradient):
        assert values[1].isnan().any()
        assert values[[0, 2]].isfinite().all()
    assert hamming_loss(matching, truth).isnan().tolist() == [False, True, False]


def test_noise_has_a_row_for_every_source_node():
    arguments, _ = graph_pairs(2, 6, neighbours=3)
    generator = torch.Generator().manual_seed(5)
    rows = {"node_noise": gumbel_noise((12, 6), generator), "edge_noise": gumbel_noise((12, 3, 18), generator)}
    found = graph_matching(**arguments, **rows, strength=80.0).argmax(2)
    node, edge = arguments["node_affinity"].clone(), arguments["edge_affinity"].clone()
    for sample in range(12):
        graph, i = divmod(sample, 6)
        node[graph, i] += rows["node_noise"][sample]
        for r in range(3):
            assert arguments["edges_source"][graph, 3 * i + r, 0] == i
            edge[graph, 3 * i + r] += rows["edge_noise"][sample, r]
    noisy = arguments | {"node_affinity": node, "edge_affinity": edge}
    assert torch.equal(found, match_graphs(**noisy))
    halves = [
        graph_matching(
            **{name: x[g : g + 1] for name, x in arguments.items()},
            **{name: noise[6 * g : 6 * g + 6] for name, noise in rows.items()},
            strength=80.0,
        )
        for g in range(2)
    ]
    assert torch.equal(found, torch.cat(halves).argmax(2))


@pytest.mark.slow
def test_learns_to_match_on_a_toy_encoder():
    generator = torch.Generator().manual_seed(0)
    encoder = torch.nn.Linear(20, 8)
    with torch.no_grad():
        encoder.weight.copy_(torch.randn(8, 20, generator=generator) / 4)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=2e-2)
    accuracies = []
    for _ in range(120):
        content = torch.randn(4, 8, 6, generator=generator)  # 6 of 20 inputs tell the nodes; the others are nuisance
        views = [torch.cat((content, torch.randn(4, 8, 14, generator=generator)), -1) for _ in range(2)]
        order = torch.randperm(8, generator=generator)
        source, target = encoder(views[0]), encoder(views[1][:, order])
        edges = [nearest_neighbour_edges(z, 3) for z in (source, target)]
        node = torch.nn.functional.normalize(source, dim=-1) @ torch.nn.functional.normalize(target, dim=-1).mT
        edge = edge_cosines(source, edges[0], target, edges[1])
        matching = graph_matching(node, edge, *edges, strength=80.0)
        error = hamming_loss(matching, order.argsort().expand(4, 8)).mean() / 16
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        accuracies.append(1 - error.item())
    assert sum(accuracies[:10]) / 10 < 0.4
    assert sum(accuracies[-10:]) / 10 > 0.7


# --- loss, edges, noise -----------------------------------------------------------------------------------------------


def test_property_4_hamming_loss():
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([torch.randperm(16, generator=generator) for _ in range(4000)])
    matching = torch.nn.functional.one_hot(found, 16).float()
    truth = torch.arange(16).expand(4000, 16)
    loss = hamming_loss(matching, truth)
    assert torch.equal(loss, 2 * (found != truth).sum(1).float())
    assert not (loss == 2).any()
    assert abs(loss.mean().item() - 2 * 15) < 0.2
    assert not hamming_loss(matching, found).any()
    matching.requires_grad_()
    hamming_loss(matching, truth).sum().backward()
    assert torch.equal(matching.grad, 1 - 2 * torch.eye(16).expand(4000, 16, 16))


@pytest.mark.parametrize("nodes, neighbours", [(2, 5), (6, 5), (7, 3)])
def test_nearest_neighbours_are_those_of_a_naive_loop(nodes, neighbours):
    features = torch.randn(3, nodes, 4, generator=torch.Generator().manual_seed(0))
    edges = nearest_neighbour_edges(features, neighbours)
    kept = min(neighbours, nodes - 1)
    assert edges.shape == (3, nodes * kept, 2)
    for g in range(3):
        for i in range(nodes):
            others = sorted((a for a in range(nodes) if a != i), key=lambda a: (features[g, i] - features[g, a]).norm())
            assert edges[g, i * kept : (i + 1) * kept].tolist() == [[i, a] for a in others[:kept]]


def test_edge_cosines_are_those_of_a_naive_loop():
    arguments, _ = graph_pairs(2, 5)
    source, target = torch.randn(2, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edges = arguments["edges_source"], arguments["edges_target"]
    cosines = edge_cosines(source, edges[0], target, edges[1])
    for e, (i, j) in enumerate(edges[0][1].tolist()):
        for f, (a, b) in enumerate(edges[1][1].tolist()):
            x, y = source[1, i] - source[1, j], target[1, a] - target[1, b]
            torch.testing.assert_close(cosines[1, e, f], x @ y / (x.norm() * y.norm()))


def test_gumbel_noise_has_its_mean_and_variance_and_is_repeated_by_its_generator():
    noise = gumbel_noise((200000,), torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.03
    assert torch.equal(noise, gumbel_noise((200000,), torch.Generator().manual_seed(0)))
