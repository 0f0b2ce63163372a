"""S2DC's correspondence of patches: its time beside that of the networks of a step.

    python benchmarks/correspondence.py
    python benchmarks/correspondence.py --patch 128 128 128 --batch 8 --device cuda --output correspondence.json

In every round these are timed one after the other: ``patch_correspondence`` for the tokens of one batch, and the least
that a step needs, forward and backward of the student's encoder and forward of the teacher's. The share is the median
of the shares in the sum, round by round. The network is nnU-Net's PlainConvUNet. The correspondence costs the same for
every patch with as many tokens, the networks grow with the patch: the share on a small patch bounds that on a large
one.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.io.files import write_json
from nnssl_plugin.methods.s2dc.correspondence import patch_correspondence
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.teacher import Teacher
from nnssl_plugin.networks.token_grid import TokenGrid
from nnssl_plugin.transforms.affine import AffineRange, random_affine

WARM_UP = 2
"""Rounds that are thrown away: the first ones allocate."""


def make_backbone(features: Sequence[int]) -> Backbone:
    """A U-Net of one channel whose stages have strides 1, 2, 4, …"""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(features)
    network = PlainConvUNet(
        1,
        stages,
        list(features),
        nn.Conv3d,
        3,
        [1] + [2] * (stages - 1),
        2,
        2,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
    )
    backbone = Backbone(network, 1)
    backbone.train_only(("encoder",))
    return backbone


def measure(
    *, patch: Sequence[int], grid: Sequence[int], batch: int, features: Sequence[int], rounds: int, device: str
) -> dict[str, Any]:
    """Median milliseconds of both, and the median share of the correspondence in their sum."""
    generator = torch.Generator(device).manual_seed(0)
    student = make_backbone(features).to(device)
    teacher = Teacher(student, 0.999)
    image = torch.randn(batch, 1, *patch, generator=generator, device=device)
    ranges = AffineRange(rotation=30.0, scale=(0.9, 1.2), translation=0.0625, flip=0.0, in_plane=None)
    affine = random_affine(batch, patch, ranges, spacing=(1.0, 1.0, 1.0), generator=generator, device=device)
    tokens = TokenGrid(tuple(grid), (0.0,) * 3, tuple(size // count for size, count in zip(patch, grid, strict=True)))
    times: list[tuple[float, float]] = []
    for _ in range(rounds + WARM_UP):
        times.append(
            (
                _seconds(lambda: patch_correspondence(affine, tokens), device),
                _seconds(lambda: _networks(student, teacher, image), device),
            )
        )
        student.zero_grad(set_to_none=True)
    kept = times[WARM_UP:]
    return {
        "tokens": math.prod(grid),
        "correspondence_ms": 1000 * statistics.median(own for own, _ in kept),
        "networks_ms": 1000 * statistics.median(rest for _, rest in kept),
        "share": statistics.median(own / (own + rest) for own, rest in kept),
        "matches_per_sample": float(patch_correspondence(affine, tokens).sum()) / batch,
    }


def _networks(student: Backbone, teacher: Teacher, image: Tensor) -> None:
    """The least that a step of a method with a teacher needs."""
    sum(maps.mean() for maps in student.features(image)).backward()
    with torch.no_grad():
        teacher.module.features(image)


def _seconds(work: Callable[[], Any], device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64], help="voxels (default: 64 64 64)")
    parser.add_argument("--grid", type=int, nargs=3, default=[8, 8, 8], help="tokens per axis (default: 8 8 8)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256], help="per stage, nnU-Net's own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch threads on a CPU (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(
        patch=args.patch,
        grid=args.grid,
        batch=args.batch,
        features=args.features,
        rounds=args.rounds,
        device=args.device,
    )
    print(
        f"{result['tokens']} tokens, batch {args.batch}, patch {'×'.join(map(str, args.patch))}, {args.device}: "
        f"correspondence {result['correspondence_ms']:.2f} ms, student and teacher {result['networks_ms']:.1f} ms, "
        f"share {100 * result['share']:.2f} %"
    )
    if args.output:
        setting = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(args.output, {"setting": setting, "result": result})


if __name__ == "__main__":
    main()
