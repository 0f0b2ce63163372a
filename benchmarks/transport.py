"""The transport solver beside the package POT: the same plan, the same objective, and the time of a solve.

    python benchmarks/transport.py
    python benchmarks/transport.py --sizes 32 64 --epsilon 0.01 --output transport.json

For each batch size both sides solve the same costs (Mahalanobis distances of random embeddings over their largest
entry) in float64 with the same number of iterations: ours against POT's entropic_partial_wasserstein, and against its
exact partial_wasserstein, whose cost is a lower bound. Times are medians of interleaved rounds (A B C A B C …); the
loss is timed with its backward pass, as training needs it. POT is in the extra ``transport``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.errors import UserError
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
}
"""Key of a row → heading of the table and format of the numbers."""


def problem(size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of matching pairs (size, dim), float64, and a metric (dim, dim)."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, dim, dtype=torch.float64, generator=generator)
    noise = torch.randn(size, dim, dtype=torch.float64, generator=generator)
    return x, x + noise, torch.eye(dim, dtype=torch.float64)


def entropic_objective(plan: np.ndarray, cost: np.ndarray, epsilon: float) -> float:
    """⟨π, C⟩ + ε Σ π log π (Med3DInsight, Eq. 1)."""
    return float((plan * cost).sum() + epsilon * (plan * np.log(np.maximum(plan, 1e-300))).sum())


def accuracy(cost: Tensor, *, mass: float, epsilon: float, iterations: int) -> dict[str, float]:
    """Our plan against POT's two."""
    partial = import_pot()
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
    partial = import_pot()
    uniform, array = np.full(len(cost), 1 / len(cost)), cost.numpy()
    x, y, metric = (tensor.clone().requires_grad_() for tensor in embeddings)
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


def measure(sizes: list[int], *, dim: int, rounds: int, **solver: Any) -> list[dict[str, float]]:
    """A row for each batch size; ``solver`` is mass, epsilon and iterations."""
    rows = []
    for size in sizes:
        embeddings = problem(size, dim)
        cost = mahalanobis_cost(*embeddings)
        cost = cost / cost.max()
        rows.append({"size": size} | accuracy(cost, **solver) | timing(embeddings, cost, rounds=rounds, **solver))
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    lines += [[format(row[key], style) for key, (_, style) in COLUMNS.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def import_pot() -> Any:
    """POT's module of partial transport.

    Raises:
        UserError: when POT is not installed.
    """
    try:
        from ot import partial
    except ImportError as error:
        raise UserError("This benchmark needs the package POT.", 'pip install "nnssl_plugin[transport]"') from error
    return partial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256], help="batch sizes")
    parser.add_argument("--dim", type=int, default=512, help="length of the embeddings")
    parser.add_argument("--mass", type=float, default=0.9)
    parser.add_argument("--epsilon", type=float, default=0.05, help="relative to the largest cost")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        rows = measure(
            args.sizes,
            dim=args.dim,
            rounds=args.rounds,
            mass=args.mass,
            epsilon=args.epsilon,
            iterations=args.iterations,
        )
    except UserError as error:
        print(f"transport: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.output:
        write_json(args.output, {"setting": vars(args), "result": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
