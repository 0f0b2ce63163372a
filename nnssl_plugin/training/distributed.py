"""Several ranks: devices, wrapping, and gathering with gradients."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_plugin.errors import UserError

CONVERT = "convert_sync_batchnorm"
"""What nnU-Net calls on every network that it wraps for several ranks."""


def check_device(requested: torch.device) -> None:
    """Refuse CUDA where PyTorch finds no GPU, or fewer than ranks of this machine ask for one.

    Raises:
        UserError: naming what to pass instead.
    """
    if requested.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise UserError(
            "PyTorch finds no GPU here, and CUDA is nnU-Net's default device.",
            "Add -device cpu to train on the processor (-device mps on a Mac), or see nnssl_plugin doctor.",
        )
    rank, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= there:
        raise UserError(
            f"Rank {rank} of this machine has no GPU: PyTorch finds {there}.", f"Start at most {there} ranks here."
        )


def device_of_rank(requested: torch.device) -> torch.device:
    """The device that this rank may use: nnU-Net takes the global rank as CUDA index, which breaks on a second node."""
    if requested.type != "cuda":
        return requested
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank() % torch.cuda.device_count())))


@contextmanager
def wrapping_for(device: torch.device, *, synchronised: bool) -> Iterator[None]:
    """Let nnU-Net's ``initialize`` wrap the network for this device; it passes device ids even on a CPU.

    Args:
        device: of this rank.
        synchronised: whether nnU-Net may replace batch normalisation by PyTorch's for several ranks, as it always does.
    """

    def wrap(network: nn.Module, device_ids=None) -> DistributedDataParallel:
        # buffers (queues, statistics) belong to the task, which updates them from gathered outputs alike on every rank
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)

    nnunets, nnunet_module.DDP = nnunet_module.DDP, wrap
    convert = vars(nn.SyncBatchNorm)[CONVERT]
    if not synchronised:
        setattr(nn.SyncBatchNorm, CONVERT, staticmethod(_unchanged))
    try:
        yield
    finally:
        nnunet_module.DDP = nnunets
        setattr(nn.SyncBatchNorm, CONVERT, convert)


def _unchanged(network: nn.Module) -> nn.Module:
    return network


def gather_samples(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-sample outputs (B, ...) of all ranks, (ranks x B, ...), in the order of the ranks.

    The backward pass sums every rank's gradient for a sample, so that after DDP's averaging each parameter has the
    gradient of the loss over all samples, whether it acts before the gathering (encoder) or after it (metric).
    """
    return {name: _GatherSamples.apply(value) for name, value in outputs.items()}


class _GatherSamples(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is the sum of what every rank has for it.

    Written here because torch deprecates ``torch.distributed.nn.functional.all_gather`` for a private successor.
    """

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        gathered = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over the ranks; the tensor itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, as DDP does for a backward pass that goes through it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank (waits for the device)."""
    return bool(mean_over_ranks(torch.tensor(float(flag), device=device)) > 0)
