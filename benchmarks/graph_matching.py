"""The graph matching solver beside pygmtools: how near to the best matching, and milliseconds per graph.

    python benchmarks/graph_matching.py --output graph_matching.json
    python benchmarks/graph_matching.py --nodes 16 --noise 0.05 --rounds 9

Pairs of graphs with 5 neighbours per node: random features of 128 dimensions, two views that are ``apart`` standard
deviations from them, cosines of nodes and edges, Gumbel noise of each scale on both. The gap is what a matching lacks
of the best affinity, over that affinity, mean over graphs: beside every permutation up to 8 nodes, above that beside
the best of 12 tabu searches from random matchings and of all solvers. Times are the least of the rounds, on one thread;
on a CPU those of the process, so that other programs count little, on other devices from the call to its result.
pygmtools (sm, ipfp, rrwm, then its Hungarian) solves the first graphs alone (--others) with its own matrix ready, where
it is installed, on a CPU.
"""

import argparse
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_plugin.io.files import write_json
from nnssl_plugin.objectives.graph_matching import (
    edge_cosines,
    gumbel_noise,
    match_graphs,
    matching_affinity,
    nearest_neighbour_edges,
)
from nnssl_plugin.objectives.quadratic_assignment import QuadraticProblem, tabu_search

OTHERS = ("sm", "ipfp", "rrwm")
LARGEST_BRUTE_FORCE = 8


def instances(
    graphs: int, nodes: int, *, apart: float, noise: float, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of ``match_graphs``, and the true matching (G, n)."""
    generator = torch.Generator().manual_seed(seed)
    centre, *offsets = torch.randn(3, graphs, nodes, 128, generator=generator)
    source, target = (centre + apart * offset for offset in offsets)
    order = torch.rand(graphs, nodes, generator=generator).argsort(1)
    target = target.gather(1, order[..., None].expand_as(target))
    edges = [nearest_neighbour_edges(features, 5) for features in (source, target)]
    node = F.normalize(source, dim=-1) @ F.normalize(target, dim=-1).mT
    edge = edge_cosines(source, edges[0], target, edges[1])
    return {
        "node_affinity": node + noise * gumbel_noise(tuple(node.shape), generator),
        "edge_affinity": edge + noise * gumbel_noise(tuple(edge.shape), generator),
        "edges_source": edges[0],
        "edges_target": edges[1],
    }, order.argsort(1)


def pair_affinity(arguments: dict[str, Tensor]) -> Tensor:
    """c^e + c^eᵀ (G, n², n²) over pairs of nodes i·n + a."""
    node, edge, source, target = arguments.values()
    n = node.shape[-1]
    tails, heads = (source[:, :, None, end] * n + target[:, None, :, end] for end in (0, 1))
    pair = edge.new_zeros(len(edge), n * n, n * n)
    graph = torch.arange(len(edge))[:, None, None]
    pair[graph, tails, heads] = edge
    return pair + pair.mT


def pygmtools_matrix(arguments: dict[str, Tensor]) -> Tensor:
    """Lawler's matrix in pygmtools' order (target first), symmetric and not negative."""
    node = arguments["node_affinity"]
    graphs, n = node.shape[:2]
    pair = pair_affinity(arguments).view(graphs, n, n, n, n).permute(0, 2, 1, 4, 3).reshape(graphs, n * n, n * n)
    matrix = pair / 2 + torch.diag_embed(node.mT.flatten(1))
    return matrix - matrix.amin((1, 2), keepdim=True).clamp(max=0)


def pygmtools_matching(matrix: Tensor, *, solver: str) -> Tensor:
    """(G, n) by one of pygmtools' solvers and its Hungarian algorithm."""
    n = round(matrix.shape[-1] ** 0.5)
    counts = torch.full((len(matrix),), n)
    pygmtools = importlib.import_module("pygmtools")
    soft = getattr(pygmtools, solver)(matrix, counts, counts, backend="pytorch")
    return pygmtools.hungarian(soft, counts, counts, backend="pytorch").argmax(2)


def best_affinity(arguments: dict[str, Tensor]) -> Tensor:
    """The best affinity known of each graph (G,): of all permutations, or of searches from random ones."""
    node = arguments["node_affinity"]
    graphs, n = node.shape[:2]
    if n <= LARGEST_BRUTE_FORCE:
        every = torch.tensor(list(itertools.permutations(range(n))))
        return torch.stack([_affinities(every, *(x[g] for x in arguments.values())).max() for g in range(graphs)])
    problem = QuadraticProblem(node, pair_affinity(arguments))
    starts = torch.rand(graphs, 12, n, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return problem.value(tabu_search(problem, starts, 250)).amax(1)


def _affinities(permutations: Tensor, node: Tensor, edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The affinity of many permutations of one graph."""
    n = len(node)
    number = torch.full((n, n), len(target))
    number[target[:, 0], target[:, 1]] = torch.arange(len(target))
    matched = number[permutations[:, source[:, 0]], permutations[:, source[:, 1]]]
    edges = F.pad(edge, (0, 1))[torch.arange(len(source)), matched].sum(1)
    return node[torch.arange(n), permutations].sum(1) + edges


def timed(run: Callable[[], Tensor], rounds: int) -> tuple[Tensor, float]:
    """The result on the CPU, and the least milliseconds of the rounds, after one that warms up."""
    result = run()
    clock = time.process_time if result.device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(rounds):
        started = clock()
        run().cpu()
        times.append(1000 * (clock() - started))
    return result.cpu(), min(times)


def measure(
    graphs: int, nodes: int, *, apart: float, noise: float, others: int, rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """A row for each solver."""
    arguments, truth = instances(graphs, nodes, apart=apart, noise=noise)
    there = {name: x.to(device) for name, x in arguments.items()}
    few = {name: x[:others] for name, x in arguments.items()}
    runs: dict[str, tuple[Callable[[], Tensor], int]] = {
        "ours": (lambda: match_graphs(**there), rounds),
        "ours, no edges": (lambda: match_graphs(**there, solver="lap"), rounds),
    }
    if device == "cpu" and importlib.util.find_spec("pygmtools"):
        matrix = pygmtools_matrix(few)
        runs |= {name: (partial(pygmtools_matching, matrix, solver=name), 1) for name in OTHERS}
    found = {name: timed(run, count) for name, (run, count) in runs.items()}
    values = {name: matching_affinity(p[:others], **few) for name, (p, _) in found.items()}
    best = torch.stack([best_affinity(few), *values.values()]).amax(0)
    return [
        {
            "nodes": nodes,
            "apart": apart,
            "noise": noise,
            "solver": name,
            "gap": float(((best - values[name]) / best.abs()).mean()),
            "optimal": float((best - values[name] <= 1e-5 * best.abs()).float().mean()),
            "correct": float((p[:others] == truth[:others]).float().mean()),
            "milliseconds": ms / len(p),
        }
        for name, (p, ms) in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: gap and milliseconds per graph of every solver, a line for each kind of graph."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = [["nodes", "apart", "noise", *solvers], ["---"] * (3 + len(solvers))]
    for kind in dict.fromkeys((row["nodes"], row["apart"], row["noise"]) for row in rows):
        of = {row["solver"]: row for row in rows if (row["nodes"], row["apart"], row["noise"]) == kind}
        cells = [f"{of[name]['gap']:.2%}, {of[name]['milliseconds']:.2f} ms" for name in solvers]
        lines.append([*(f"{value:g}" for value in kind), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200, help="graphs that are solved at once")
    parser.add_argument("--others", type=int, default=20, help="graphs that pygmtools solves and gaps are taken of")
    parser.add_argument("--nodes", type=int, nargs="+", default=[7, 16])
    parser.add_argument("--apart", type=float, nargs="+", default=[0.3, 1.0], help="how far two views differ")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.3, 1.0], help="scale of Gumbel's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    count = {"others": args.others, "rounds": args.rounds, "device": args.device}
    for nodes, apart, noise in itertools.product(args.nodes, args.apart, args.noise):
        rows += measure(args.graphs, nodes, apart=apart, noise=noise, **count)
    print(table(rows))
    if args.output:
        write_json(args.output, {"setting": vars(args), "result": rows})


if __name__ == "__main__":
    main()
