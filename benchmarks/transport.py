"""The transport solver beside the package POT: the same plan, the same objective, time of a solve, and operators.

    python benchmarks/transport.py
    python benchmarks/transport.py --sizes 4 --noise 0.3
    python benchmarks/transport.py --sizes 32 64 --epsilon 0.01 --output transport.json

For each batch size both sides solve the same costs (Mahalanobis distances of random embeddings over their largest
entry) in float64 with the same number of iterations: ours against POT's entropic_partial_wasserstein, and against its
exact partial_wasserstein, whose cost is a lower bound. Times are medians of interleaved rounds (A B C A B C …) in
float32, as in training; the loss is timed with its backward pass. Operators are those of the loss forward and backward
that compute something (no views), beside those of the same loss with autograd through the iterations.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ot import partial
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nnssl_plugin.io.files import write_json
from nnssl_plugin.objectives.partial_transport import mahalanobis_cost, mpot_loss, partial_transport_plan

COLUMNS = {
    "size": ("batch", "d"),
    "plan_difference": ("plan, largest difference", ".1e"),
    "mass_error": ("mass, error", ".1e"),
    "marginal_excess": ("marginals, excess × n", ".1e"),
    "objective_difference": ("objective, difference", ".1e"),
    "cost_over_exact": ("cost / exact cost", ".4f"),
    "ms_plan": ("plan (ms)", ".2f"),
    "ms_pot_entropic": ("POT entropic (ms)", ".2f"),
    "ms_pot_exact": ("POT exact (ms)", ".2f"),
    "ms_loss_forward": ("loss forward (ms)", ".2f"),
    "ms_loss_backward": ("loss backward (ms)", ".2f"),
    "operators": ("operators of the loss", "d"),
    "operators_unrolled": ("through the iterations", "d"),
}
"""Key of a row → heading of the table and format of the numbers."""
MOVE_NO_DATA = """
alias as_strided as_strided_ detach diagonal empty empty_like empty_strided expand fill_ item _local_scalar_dense mH mT
narrow permute promote_types real reshape _reshape_alias resize_ resolve_conj resolve_neg result_type scalar_tensor
select set_ slice squeeze t to transpose transpose_ unbind unsqueeze _unsafe_view view
"""
"""Operators without a kernel of their own on a GPU (``fill_``: a number made a tensor on the host)."""


def problem(size: int, dim: int, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of matching pairs (size, dim), float64, ``noise`` apart, and a metric (dim, dim)."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, dim, dtype=torch.float64, generator=generator)
    apart = torch.randn(size, dim, dtype=torch.float64, generator=generator)
    return x, x + noise * apart, torch.eye(dim, dtype=torch.float64)


def entropic_objective(plan: np.ndarray, cost: np.ndarray, epsilon: float) -> float:
    """⟨π, C⟩ + ε Σ π log π (Med3DInsight, Eq. 1)."""
    return float((plan * cost).sum() + epsilon * (plan * np.log(np.maximum(plan, 1e-300))).sum())


def accuracy(cost: Tensor, *, mass: float, epsilon: float, iterations: int) -> dict[str, float]:
    """Our plan against POT's two."""
    size, array = len(cost), cost.numpy()
    uniform = np.full(size, 1 / size)
    ours = partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=iterations).numpy()
    theirs = partial.entropic_partial_wasserstein(uniform, uniform, array, epsilon, m=mass, numItermax=iterations)
    exact = partial.partial_wasserstein(uniform, uniform, array, m=mass)
    sums = np.concatenate([ours.sum(0), ours.sum(1)])
    return {
        "plan_difference": float(np.abs(ours - theirs).max()),
        "mass_error": abs(float(ours.sum()) - mass),
        "marginal_excess": float(sums.max() * size - 1),
        "objective_difference": abs(
            entropic_objective(ours, array, epsilon) - entropic_objective(theirs, array, epsilon)
        ),
        "cost_over_exact": float((ours * array).sum() / (exact * array).sum()),
    }


def timing(embeddings: tuple[Tensor, Tensor, Tensor], cost: Tensor, *, rounds: int, **solver: Any) -> dict[str, float]:
    """Median milliseconds of a solve on each side, and of the loss forward and backward."""
    cost = cost.float()
    uniform, array = np.full(len(cost), 1 / len(cost), dtype=np.float32), cost.numpy()
    x, y, metric = _trainable(embeddings)
    loss: list[Tensor] = []
    runs: dict[str, Callable[[], Any]] = {
        "ms_plan": lambda: partial_transport_plan(cost, **solver),
        "ms_pot_entropic": lambda: partial.entropic_partial_wasserstein(
            uniform, uniform, array, solver["epsilon"], m=solver["mass"], numItermax=solver["iterations"]
        ),
        "ms_pot_exact": lambda: partial.partial_wasserstein(uniform, uniform, array, m=solver["mass"]),
        "ms_loss_forward": lambda: loss.append(mpot_loss(x, y, metric, **solver)),
        "ms_loss_backward": lambda: loss.pop().backward(),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up


def unrolled_loss(x: Tensor, y: Tensor, metric: Tensor, *, mass: float, epsilon: float, iterations: int) -> Tensor:
    """``mpot_loss`` with autograd through the logarithmic iterations."""
    cost = mahalanobis_cost(x, y, metric)
    kernel = cost / cost.amax((-2, -1), keepdim=True) / -epsilon
    size = len(x)
    g = torch.zeros_like(kernel[:1])
    h = math.log(mass) - torch.logsumexp(kernel, (-2, -1), keepdim=True)
    for _ in range(iterations):
        f = (-math.log(size) - h - torch.logsumexp(kernel + g, -1, keepdim=True)).clamp(max=0)
        sums = torch.logsumexp(kernel + f, -2, keepdim=True)
        g = (-math.log(size) - h - sums).clamp(max=0)
        h = math.log(mass) - torch.logsumexp(sums + g, -1, keepdim=True)
    return math.log(mass) - math.log(size) - (kernel + f + g + h).diagonal().mean()


def operators(embeddings: tuple[Tensor, Tensor, Tensor], loss: Callable[..., Tensor], **solver: Any) -> int:
    """Operators of a loss, forward and backward, that compute something: those that call no other such."""
    variables = _trainable(embeddings)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss(*variables, **solver).backward()
    return sum(_computes(event) and not any(map(_computes, event.cpu_children)) for event in profiler.events())


def _computes(event: Any) -> bool:
    kind, _, name = event.name.partition("::")
    return kind == "aten" and name not in MOVE_NO_DATA.split()


def _trainable(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies in float32 that take a gradient."""
    return [tensor.detach().clone().float().requires_grad_() for tensor in tensors]


def measure(sizes: list[int], *, dim: int, rounds: int, noise: float = 1.0, **solver: Any) -> list[dict[str, float]]:
    """A row for each batch size; ``solver`` is mass, epsilon and iterations."""
    rows = []
    for size in sizes:
        embeddings = problem(size, dim, noise)
        cost = mahalanobis_cost(*embeddings)
        cost = cost / cost.max()
        counts = {
            "operators": operators(embeddings, mpot_loss, **solver),
            "operators_unrolled": operators(embeddings, unrolled_loss, **solver),
        }
        times = timing(embeddings, cost, rounds=rounds, **solver)
        rows.append({"size": size} | accuracy(cost, **solver) | times | counts)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    lines += [[format(row[key], style) for key, (_, style) in COLUMNS.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256], help="batch sizes")
    parser.add_argument("--dim", type=int, default=512, help="length of the embeddings")
    parser.add_argument("--noise", type=float, default=1.0, help="how far the pairs are apart")
    parser.add_argument("--mass", type=float, default=0.9)
    parser.add_argument("--epsilon", type=float, default=0.05, help="relative to the largest cost")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(
        args.sizes,
        dim=args.dim,
        rounds=args.rounds,
        noise=args.noise,
        mass=args.mass,
        epsilon=args.epsilon,
        iterations=args.iterations,
    )
    print(table(rows))
    if args.output:
        write_json(args.output, {"setting": vars(args), "result": rows})


if __name__ == "__main__":
    main()
