"""Memory of forward and backward, counted, not measured: on the meta device, which computes nothing.

    python benchmarks/memory.py                                         # nnU-Net's U-Nets, Primus and PatchViT
    python benchmarks/memory.py --networks resenc-l primus-m --patch 160 160 160 --batch 2

Every storage that an operator makes is counted from then until nobody holds it; the greatest sum is told, in GiB.
Maps are in half precision, as under autocast on CUDA. Weights, gradients and the optimiser's two moments, float32 all,
stand apart and are the same for every variant. What a convolution needs besides for its work is not counted, nor is
what PyTorch's allocator cannot use between two blocks: a GPU needs more, the differences between variants hold.
"""

import argparse
import weakref
from collections.abc import Callable

import torch
from device_work import tensors_of
from fast_blocks import FEATURES, planned_network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks import instance_norm
from nnssl_plugin.networks.fast_blocks import use_fast_blocks
from nnssl_plugin.networks.instance_norm import Gradients, Normalised
from nnssl_plugin.networks.recomputing import recompute_activations

GIB = 2**30


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operators made and somebody holds, and the most that they ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {id(each.untyped_storage()) for each in tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if id(storage) not in known and id(storage) not in self._alive:
                self._watch(storage)
        self.peak = max(self.peak, self.bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget(_) -> None:
            self.bytes -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, forget)
        self.bytes += size


class AsOnCuda:
    """Makes what Triton's kernels make, in place of the operators that other devices use."""

    @staticmethod
    def normalised(x, *_, **__) -> Normalised:
        mean, scale = (torch.empty(x.shape[:2], device=x.device) for _ in range(2))
        return Normalised(torch.empty_like(x), mean, scale)

    @staticmethod
    def gradients(gradient, x, weight, bias, y, **_) -> Gradients:
        weights = torch.empty(2, x.shape[1], device=x.device)
        return Gradients(torch.empty_like(x), weights[0], weights[1], None if y is None else torch.empty_like(x))


class Attention(torch.autograd.Function):
    """Makes what attention without its matrix makes; the meta device would take the way that keeps it."""

    @staticmethod
    def forward(ctx, queries, keys, values):
        result = torch.empty_like(queries)
        ctx.save_for_backward(queries, keys, values, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, _ = ctx.saved_tensors
        return tuple(torch.empty_like(each) for each in (queries, keys, values))


def primus(size: str, patch: tuple[int, ...]) -> nn.Module:
    """One of nnU-Net's."""
    from dynamic_network_architectures.architectures import primus as networks

    return getattr(networks, f"Primus{size}")(1, 2, (8, 8, 8), patch)


def patch_vit(size: str, patch: tuple[int, ...]) -> nn.Module:
    from nnssl_plugin.networks.patch_vit import PatchViT

    width, heads = {"B": (768, 12), "S": (384, 6)}[size]
    return PatchViT(1, 2, embed_dim=width, num_heads=heads)


NETWORKS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "plain": lambda patch: planned_network("plain", FEATURES),
    "resenc-l": lambda patch: planned_network("resenc", FEATURES),
    "primus-s": lambda patch: primus("S", patch),
    "primus-m": lambda patch: primus("M", patch),
    "patch-vit-b": lambda patch: patch_vit("B", patch),
}
VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    "stock": lambda network: None,
    "fast": use_fast_blocks,
    "recompute": recompute_activations,
    "fast, recompute": lambda network: (use_fast_blocks(network), recompute_activations(network)),
}


def peak_gib(network: nn.Module, image: torch.Tensor) -> float:
    """Of forward and backward, the gradients of the weights left out."""
    with LiveStorages() as storages:
        network(image).mean().backward()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in network.parameters() if p.grad is not None)
    return (storages.peak - gradients) / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--patch", type=int, nargs=3, default=(128, 128, 128))
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    instance_norm._kernels = lambda x: AsOnCuda
    nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)
    print(f"GiB of maps at a patch of {'×'.join(map(str, args.patch))}, batch {args.batch}, half precision; counted")
    print("| network | weights and optimiser | " + " | ".join(VARIANTS) + " |\n|---|---|" + "---|" * len(VARIANTS))
    for name in args.networks:
        with torch.device("meta"):
            image = torch.empty(args.batch, 1, *args.patch, dtype=torch.half)
            cells = []
            for change in VARIANTS.values():
                network = NETWORKS[name](tuple(args.patch))
                cells.append(counted(network.half(), change, image))
        fixed = 16 * sum(parameter.numel() for parameter in network.parameters()) / GIB
        print(f"| {name} | {fixed:.2f} | {' | '.join(cells)} |")


def counted(network: nn.Module, change: Callable[[nn.Module], object], image: torch.Tensor) -> str:
    """The memory of a variant, or ``-`` where the network has none."""
    try:
        change(network)
    except UserError:
        return "-"
    return f"{peak_gib(network, image):.2f}"


if __name__ == "__main__":
    main()
