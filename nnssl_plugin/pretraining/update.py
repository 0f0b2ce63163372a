"""The optimiser's step of a pretraining: clipped, and skipped on the device where a number is not finite."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


def update(optimizer: Optimizer, total: Tensor, *, scaler: GradScaler | None, clip: float) -> Tensor:
    """Clip the gradients and step, on all ranks or on none; the host does not wait for the device.

    Args:
        optimizer: a fused one, with the gradients of the step. Groups with ``clip=False`` are left unclipped.
        total: () the loss of the step.
        scaler: of mixed precision.
        clip: largest norm of the gradient.

    Returns:
        () bool on the device: False where the loss or a gradient was not finite, and nothing was changed.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    clipped = [p for group in optimizer.param_groups if group.get("clip", True) for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(clipped, clip)
    broken = (~torch.isfinite(norm + total.detach())).float()
    for group in optimizer.param_groups:
        if not group.get("clip", True):
            broken += sum((~torch.isfinite(p.grad)).any().float() for p in group["params"] if p.grad is not None)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    broken = broken.clamp(max=1)
    _step(optimizer, broken)
    if scaler is not None:
        scaler.update()
    return broken == 0


def _step(optimizer, broken: Tensor) -> None:
    """Step unless ``broken`` is 1, which only the device reads: fused optimisers honour ``found_inf``."""
    optimizer.grad_scale, optimizer.found_inf = None, broken
    optimizer.step()
