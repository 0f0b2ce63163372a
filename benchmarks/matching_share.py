"""What the matching takes of a training step of LVM-Med: affinities, solver and their gradient beside the encoder.

    OMP_NUM_THREADS=1 python benchmarks/matching_share.py --output matching_share.json
    python benchmarks/matching_share.py --batch 16 --blocks 1 1 1 1 --size 64 --rounds 1
    python benchmarks/matching_share.py --device cuda --rounds 9

The task is the real one with a ResNet-50 (--blocks) on random images. In every round these are timed one after the
other, in seconds of this process on the CPU, or with --device cuda, under mixed precision, until all is done there:

    step       views, encoder, matching, and the gradients of all of it
    matching   the loss alone with its gradient down to what the encoder gave: graphs, message passing, local and global
               affinities, solver
    solver     the solver alone on the affinities of that loss, with the method's noise

Shares are medians over the rounds, after one on CUDA that warms up.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nnssl_plugin.io.files import write_json
from nnssl_plugin.methods.lvm_med.objective import LVMMed
from nnssl_plugin.methods.lvm_med.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.resnet_unet import ResNetUNet
from nnssl_plugin.objectives.graph_matching import match_graphs


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of this process on the CPU; on CUDA those that pass until everything is done."""
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def task_of(blocks: list[int], size: int, noise: float) -> LVMMed:
    """LVM-Med with a ResNet of these blocks."""
    torch.manual_seed(0)
    backbone = Backbone(ResNetUNet(3, 2, blocks=blocks), 3)
    return LVMMed(backbone, Settings(noise=noise), size=(size, size), spacing=(1.0, 1.0)).train()


def measure(task: LVMMed, batch: dict[str, Tensor], seed: int) -> dict[str, float]:
    """Seconds of a step and of its parts."""
    device = batch["image"].device
    generator = torch.Generator(device).manual_seed(seed)
    precision = torch.autocast(device.type, enabled=device.type == "cuda")

    def step() -> None:
        task.zero_grad()
        with precision:
            total = task(task.views(batch, generator), 0.0)["total"]
        total.backward()

    with torch.no_grad(), precision:
        encoded, _ = task.encode(task.views(batch, generator))
    leaves = {name: value.detach().requires_grad_(name[-2:] in ("_z", "_q")) for name, value in encoded.items()}

    def matching() -> None:
        task.loss(leaves, 0.0)["matching"].backward()

    with torch.no_grad():
        pairs = task._pairs(leaves)
        noise = [task._of_graphs(leaves[name]) for name in ("node_noise", "edge_noise")]
        node, edge = pairs.node_affinity + noise[0], pairs.edge_affinity + noise[1].reshape(pairs.edge_affinity.shape)
    timed = {
        "step": seconds(step, device),
        "matching": seconds(matching, device),
        "solver": seconds(lambda: match_graphs(node, edge, pairs.edges_source, pairs.edges_target), device),
    }
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images of a step (default: 32, two graphs)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--blocks", type=int, nargs=4, default=[3, 4, 6, 3], help="default: those of ResNet-50")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.05], help="scales of the noise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    image = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    batch = {"image": image.to(args.device), "available": torch.ones(args.batch, 3, dtype=bool, device=args.device)}
    warm_up = int(args.device != "cpu")
    results = []
    for noise in args.noise:
        task = task_of(args.blocks, args.size, noise).to(args.device)
        rounds = [measure(task, batch, seed) for seed in range(warm_up + args.rounds)][warm_up:]
        shares = {part: statistics.median(r[part] / r["step"] for r in rounds) for part in ("matching", "solver")}
        results.append({"noise": noise, "rounds": rounds, "shares": shares})
        print(f"noise {noise}: matching {shares['matching']:.1%} of the step, solver {shares['solver']:.1%}")
    if args.output is not None:
        setting = {key: value for key, value in vars(args).items() if key != "output"}
        setting |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(args.output, {"setting": setting, "results": results})


if __name__ == "__main__":
    main()
