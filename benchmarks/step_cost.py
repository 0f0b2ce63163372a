"""Cost of one pretraining step over the bare network's forward and backward on the same voxels, in one run.

    python benchmarks/step_cost.py --patch 40 56 40 --batch 2 --features 32 64 128 256
    python benchmarks/step_cost.py --device cuda --patch 128 128 128 --batch 4 --output step_cost.json

Both sides are timed in turn (A B A B …) on generated tensors; the table gives medians, and the ratio is the median of
the ratios pair by pair, which holds where the machine's speed drifts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnssl_plugin.files import write_json
from nnssl_plugin.methods.med3dinsight.objective import Med3DInsight
from nnssl_plugin.methods.med3dinsight.settings import Settings
from nnssl_plugin.networks.backbone import Backbone


def planned_network(features: list[int], channels: int) -> nn.Module:
    """A PlainConvUNet as nnU-Net plans it: two convolutions a stage, stride 2 between stages."""
    stages = len(features)
    return PlainConvUNet(
        channels, stages, features, nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, 2, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )


def random_batch(args: argparse.Namespace) -> dict:
    """What the loader would bring for one step."""
    size, device = args.batch, args.device
    return {
        "image": torch.randn(size, args.channels, *args.patch, device=device),
        "available": torch.ones(size, args.channels, dtype=torch.bool, device=device),
        "plane": torch.arange(size, device=device) % 3,
        "slice_position": torch.rand(size, device=device),
        "image_embedding": torch.randn(size, args.embedding, device=device),
        "text_embedding": torch.randn(size, args.embedding, device=device),
    }


class Step:
    """The pretrainer's step, part by part."""

    def __init__(self, task: Med3DInsight, args: argparse.Namespace):
        self.task, self.args = task, args
        self.optimizer = torch.optim.AdamW(task.parameter_groups(), lr=1e-4, fused=True)
        self.generator = torch.Generator(args.device).manual_seed(0)
        self.batch = random_batch(args)
        self.applied = torch.ones((), dtype=torch.bool, device=args.device)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Name → what to time; they are run in this order."""
        return {
            "views": self._views,
            "forward": self._forward,
            "backward": lambda: self.total.backward(),
            "update": self._update,
            "after step": lambda: self.task.after_step(0.0, self.applied),
        }

    def _views(self) -> None:
        self.views = self.task.views(self.batch, self.generator)

    def _forward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", enabled=self.args.device == "cuda"):
            self.total = self.task(self.views, 0.0)["total"]

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.task.parameters(), 12)
        self.optimizer.step()


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall time of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(args: argparse.Namespace) -> dict:
    """Medians in seconds: the bare network, the parts of the step, their sum, and the ratio."""
    torch.manual_seed(0)
    backbone = Backbone(planned_network(args.features, args.channels), args.channels)
    settings = Settings(queries=args.queries, dim=args.dim)
    step = Step(Med3DInsight(backbone, settings, args.embedding).to(args.device), args)
    bare = planned_network(args.features, args.channels).to(args.device)

    def network() -> None:
        bare.zero_grad(set_to_none=True)
        with torch.autocast("cuda", enabled=args.device == "cuda"):
            output = bare(step.batch["image"])
        output.float().square().mean().backward()

    rounds = []
    for _ in range(args.rounds + 2):
        times = {"bare network": seconds(network, args.device)}
        times |= {name: seconds(run, args.device) for name, run in step.parts().items()}
        rounds.append(times | {"step": sum(times.values()) - times["bare network"]})
    rounds = rounds[2:]  # the first two warm up
    result = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return result | {"ratio": statistics.median(r["step"] / r["bare network"] for r in rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[40, 56, 40], help="voxels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256], help="per stage")
    parser.add_argument("--queries", type=int, default=Settings.queries)
    parser.add_argument("--dim", type=int, default=Settings.dim)
    parser.add_argument("--embedding", type=int, default=512, help="length of the frozen embeddings")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    result = measure(args)
    for name, value in result.items():
        print(f"{name:<14}{value:8.3f}" + ("" if name == "ratio" else " s"))
    if args.output:
        write_json(args.output, {"setting": json.loads(json.dumps(vars(args))), "result": result})


if __name__ == "__main__":
    main()
