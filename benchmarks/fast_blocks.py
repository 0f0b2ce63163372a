"""Fast blocks beside the stock ones: time, memory and operators (or launches) of forward and backward.

    python benchmarks/fast_blocks.py -device cuda --patch 160 160 160              # ResEnc-L, half precision
    python benchmarks/fast_blocks.py -device cuda --precision bfloat16
    OMP_NUM_THREADS=1 python benchmarks/fast_blocks.py --network plain --features 16 32 64 128 --patch 48 48 48

Variants are timed one after the other in every round, and the medians of their ratios to the stock network are told:
``stock``; ``channels-last`` (weights and image alone); ``compiled`` (channels-last, by torch.compile); ``fast``.
"""

import argparse
import copy
import statistics
import time

import torch
from device_work import work_of
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_plugin.networks.fast_blocks import use_fast_blocks

NETWORKS = {"plain": PlainConvUNet, "resenc": ResidualEncoderUNet}
FEATURES = (32, 64, 128, 256, 320, 320)
BLOCKS = (1, 3, 4, 6, 6, 6)
"""Of ResEnc-L; a plain network has two convolutions per stage."""
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def planned_network(kind: str, features: tuple[int, ...]) -> nn.Module:
    """A 3D network of one channel as nnU-Net plans it."""
    stages = len(features)
    numbers = {"n_conv_per_stage": 2} if kind == "plain" else {"n_blocks_per_stage": BLOCKS[:stages]}
    return NETWORKS[kind](
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        num_classes=2,
        n_conv_per_stage_decoder=2 if kind == "plain" else 1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **numbers,
    )


def variants(network: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Copies of a network, changed as their names say."""
    found = {}
    for name in names:
        found[name] = copied = copy.deepcopy(network)
        if name in ("channels-last", "compiled"):
            copied.to(memory_format=torch.channels_last_3d)
        if name == "fast":
            use_fast_blocks(copied)
        if name == "compiled":
            copied.compile()
    return found


class Step:
    """Forward and backward of a network on one batch."""

    def __init__(self, network: nn.Module, image: torch.Tensor, precision: torch.dtype, *, channels_last: bool):
        self.network, self.precision = network, precision
        self.image = image.contiguous(memory_format=torch.channels_last_3d) if channels_last else image

    def __call__(self) -> None:
        self.network.zero_grad(set_to_none=True)
        device = self.image.device.type
        with torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32):
            loss = self.network(self.image).float().square().mean()
        loss.backward()

    def seconds(self) -> float:
        """Of the process on a CPU, of the wall on CUDA."""
        cuda = self.image.device.type == "cuda"
        clock = time.perf_counter if cuda else time.process_time
        if cuda:
            torch.cuda.synchronize()
        started = clock()
        self()
        if cuda:
            torch.cuda.synchronize()
        return clock() - started


def peak_gib(step: Step) -> float | None:
    """Memory of a step on CUDA."""
    if step.image.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--network", choices=NETWORKS, default="resenc")
    parser.add_argument("--features", type=int, nargs="+", default=FEATURES)
    parser.add_argument("--patch", type=int, nargs=3, default=(64, 64, 64))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, help="default: float16 on CUDA, float32 on a CPU")
    parser.add_argument("--variants", nargs="+", default=["stock", "channels-last", "fast"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    precision = PRECISIONS[args.precision or ("float16" if args.device == "cuda" else "float32")]
    torch.manual_seed(0)
    network = planned_network(args.network, tuple(args.features)).to(args.device)
    image = torch.randn(args.batch, 1, *args.patch, device=args.device)
    steps = {
        name: Step(each, image, precision, channels_last=name in ("channels-last", "compiled"))
        for name, each in variants(network, args.variants).items()
    }
    for step in steps.values():
        step()
    rounds = [{name: step.seconds() for name, step in steps.items()} for _ in range(args.rounds)]
    first = args.variants[0]
    for name, step in steps.items():
        seconds = statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each[first] for each in rounds)
        memory = peak_gib(step)
        told = [f"{key} {value:.4g}" for key, value in work_of(step, args.device).items()]
        told += [] if memory is None else [f"{memory:.2f} GiB"]
        print(f"{name}: {1000 * seconds:.1f} ms, {ratio:.3f} of {first}, {', '.join(told)}")
    print(f"{args.network} {list(args.features)}, patch {list(args.patch)}, batch {args.batch}, {precision}")


if __name__ == "__main__":
    main()
