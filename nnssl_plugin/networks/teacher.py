"""The teacher of a student network: its exponential moving average."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """A frozen copy of a student that follows it slowly (Tarvainen & Valpola, "Mean teachers", NeurIPS 2017).

    It is always in evaluation mode, whatever mode its parent is put into: no dropout, and BatchNorm with the averaged
    running statistics, so that using it changes no state and samples do not depend on each other. State is in the
    copy's parameters and buffers, so that a run resumes exactly.

    Args:
        student: the network to copy, e.g. a backbone with its heads; it is not kept.
        momentum: share of its own values that the teacher keeps in an update, in [0, 1].

    Raises:
        ValueError: for a momentum outside [0, 1].
    """

    def __init__(self, student: nn.Module, momentum: float):
        super().__init__()
        _check(momentum)
        self.momentum = momentum
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Set the mode of the teacher's shell; the network in it stays in evaluation mode."""
        super().train(mode)
        self.module.eval()
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the copied network returns, without gradient."""
        return self.module(*inputs, **options)

    @torch.no_grad()
    def update(self, student: nn.Module, applied: Tensor, momentum: float | None = None) -> None:
        """Move towards the student: teacher ← momentum · teacher + (1 − momentum) · student.

        Parameters and floating-point buffers (BatchNorm's statistics) are averaged, other buffers (its counter)
        copied, each tensor once, under however many keys a network keeps it. A tensor that equals the student's stays
        as it is, bit for bit; momentum 0 follows to rounding (:meth:`copy_from` is exact).

        Args:
            student: the network of the constructor, after the optimiser's step.
            applied: () bool on the device, False where that step was skipped: then nothing changes.
            momentum: for this step, where it follows a schedule.

        Raises:
            ValueError: for a momentum outside [0, 1], or a student with other tensors.
        """
        momentum = self.momentum if momentum is None else momentum
        _check(momentum)
        own, target = _pairs(self.module.parameters(), student.parameters())
        if own:
            # a skipped step leaves the student's parameters finite, so that 0 times the change is 0
            _move(own, target, (1 - momentum) * applied.to(own[0].dtype))
        for kept, new in zip(*_pairs(self.module.buffers(), student.buffers()), strict=True):
            wanted = torch.lerp(kept, new, 1 - momentum) if kept.is_floating_point() else new
            kept.copy_(torch.where(applied, wanted, kept))

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Take over the student's parameters and buffers exactly, e.g. after weights were loaded into it."""
        own, target = _pairs(_state(self.module), _state(student))
        for kept, new in zip(own, target, strict=True):
            kept.copy_(new)


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _move(own: list[Tensor], target: list[Tensor], share: Tensor) -> None:
    """own ← own + share · (target − own), in place; ``share`` is () on the device."""
    moves = _in_one_pass if share.device.type == "cpu" else _in_three_launches
    moves(own, target, share)


def _in_one_pass(own: list[Tensor], target: list[Tensor], share: Tensor) -> None:
    for kept, new in zip(own, target, strict=True):
        kept.lerp_(new, share.to(kept.dtype))


def _in_three_launches(own: list[Tensor], target: list[Tensor], share: Tensor) -> None:
    change = torch._foreach_sub(target, own)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(own, change)


def _pairs(own: Iterable[Tensor], others: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    own, others = list(own), list(others)
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in others]:
        raise ValueError("the student's tensors are not those that the teacher was copied from")
    return own, others


def _check(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], not {momentum}")
