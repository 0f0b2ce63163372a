"""What a piece of work asks of the device: operators on a CPU; launches, kernel time and waits of the host on CUDA."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the host waits for the device."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


class Operators(TorchDispatchMode):
    """Counts the operators that reach the device, forward and backward, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return result


def work_of(work: Callable[[], Any], device: str) -> dict[str, float]:
    """The numbers of one call: ``operators`` on a CPU; ``launches``, ``kernel_ms`` and ``waits`` on CUDA.

    Args:
        work: what to count; call it once before, so that nothing is made for the first time.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if device != "cuda":
        with Operators() as operators:
            work()
        return {"operators": operators.count}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        work()
    torch.cuda.synchronize()
    events = profile.key_averages()
    return {
        "launches": sum(each.count for each in events if each.key in LAUNCHES),
        "kernel_ms": sum(each.self_device_time_total for each in events if each.device_type == DeviceType.CUDA) / 1000,
        "waits": sum(each.count for each in events if each.key in WAITS),
    }


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, of an operator's arguments or results."""
    return [each for each in tree_leaves(value) if isinstance(each, torch.Tensor)]
