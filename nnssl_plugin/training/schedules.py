"""Learning rates and weight decays as functions of the step alone, which keep the ratios between parameter groups.

nnU-Net calls ``lr_scheduler.step(epoch)``; its own ``PolyLRScheduler`` writes one rate into every group. Here a group's
rate is the scheduled rate times ``group["lr_scale"]`` (1 where it is not given), and 0 before
``group["frozen_until"]`` (0 where it is not given). Nothing is remembered between calls: a resumed run needs no state.
"""

import math
from collections.abc import Collection

from torch.optim import Optimizer

from nnssl_plugin.errors import UserError


class Schedule:
    """Linear warm-up, then a decay from ``lr`` to 0; before both, where asked for, a short cycle of its own.

    The rate at step k is ``lr * (k + 1) / (warmup + 1)`` before ``warmup``, and ``lr * decay(p)`` from there on, with
    ``p = (k - warmup) / (total - warmup)``, from 0 to 1. At k = warmup it is ``lr``, from k = total on it is 0.
    With ``first_cycle`` n, the first n steps are such a run by themselves, half of it warm-up, and the rest is another
    one: two teeth of a saw, one for what trains alone at first and one for everything.

    Args:
        optimizer: its groups' rates are set, first for step 0.
        lr: the largest rate (of a group whose ``lr_scale`` is 1).
        total: steps of the whole run (epochs, where it is stepped once per epoch).
        warmup: steps of warm-up; a fraction is allowed.
        first_cycle: steps of the cycle before.

    Raises:
        UserError: when the warm-up is negative or leaves nothing of the run.
    """

    def __init__(self, optimizer: Optimizer, *, lr: float, total: int, warmup: float = 0, first_cycle: int = 0):
        if not 0 <= warmup < total - first_cycle:
            before = f" after {first_cycle} in which the decoder trains alone" if first_cycle else ""
            raise UserError(
                f"A warm-up of {warmup:g}{before} does not fit into a training of {total:g} steps.",
                "Make the warm-up shorter or the training longer.",
            )
        self.optimizer = optimizer
        self.lr = lr
        self.total = total
        self.warmup = warmup
        self.first_cycle = first_cycle
        self.step(0)

    def decay(self, progress: float) -> float:
        """The factor after the warm-up, 1 at ``progress`` 0; at 1 it is 0, unless the schedule says otherwise."""
        raise TypeError(f"{type(self).__name__} must define decay()")

    def rate(self, step: int) -> float:
        """The scheduled rate at ``step`` (from 0), before any group's factor."""
        if step < self.first_cycle:
            return self._tooth(step, self.first_cycle, self.first_cycle / 2)
        return self._tooth(step - self.first_cycle, self.total - self.first_cycle, self.warmup)

    def _tooth(self, step: int, total: float, warmup: float) -> float:
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        return self.lr * self.decay(min(1.0, (step - warmup) / (total - warmup)))

    def step(self, current_step: int) -> None:
        """Set the rate of every group for ``current_step``."""
        rate = self.rate(current_step)
        for group in self.optimizer.param_groups:
            frozen = current_step < group.get("frozen_until", 0)
            group["lr"] = 0.0 if frozen else rate * group.get("lr_scale", 1.0)

    def get_last_lr(self) -> list[float]:
        """The rates that are set now, one per group."""
        return [group["lr"] for group in self.optimizer.param_groups]


class PolySchedule(Schedule):
    """Warm-up, then ``(1 - p) ** 0.9``: nnU-Net's schedule where the warm-up is 0 and every ``lr_scale`` is 1."""

    exponent = 0.9

    def decay(self, progress: float) -> float:
        return (1 - progress) ** self.exponent


class CosineSchedule(Schedule):
    """Warm-up, then half a cosine: ``(1 + cos(pi * p)) / 2`` (Loshchilov and Hutter 2017, SGDR, eq. 5, one cycle)."""

    def decay(self, progress: float) -> float:
        return half_cosine(progress)


class HalvingSchedule(Schedule):
    """Warm-up, then the rate is halved four times, after each fifth of what is left: it ends at a sixteenth."""

    halvings = 4

    def decay(self, progress: float) -> float:
        fifths = math.floor(progress * (self.halvings + 1) + 1e-9)  # rounding must not delay a halving by a step
        return 0.5 ** min(fifths, self.halvings)


class WeightDecaySchedule:
    """Half a cosine from one weight decay to another over the whole run (Caron et al. 2021, DINO, section 3.3).

    Args:
        optimizer: its groups' weight decays are set, first for step 0.
        start: at step 0.
        end: at step ``total``.
        total: steps of the whole run.
        spared: numbers of the groups that keep their own weight decay.
    """

    def __init__(self, optimizer: Optimizer, *, start: float, end: float, total: int, spared: Collection[int] = ()):
        self.optimizer = optimizer
        self.start, self.end, self.total = start, end, total
        self.spared = spared
        self.step(0)

    def step(self, current_step: int) -> None:
        """Set the weight decay of every group for ``current_step``."""
        share = half_cosine(min(1.0, current_step / self.total))
        for number, group in enumerate(self.optimizer.param_groups):
            if number not in self.spared:
                group["weight_decay"] = self.end + (self.start - self.end) * share


class Schedules:
    """Several schedules of one optimiser, stepped together; the first is that of the rates."""

    def __init__(self, rates: Schedule, *others: WeightDecaySchedule):
        self.rates, self.others = rates, others

    def step(self, current_step: int) -> None:
        """Set everything for ``current_step``."""
        self.rates.step(current_step)
        for schedule in self.others:
            schedule.step(current_step)

    def get_last_lr(self) -> list[float]:
        """The rates that are set now, one per group."""
        return self.rates.get_last_lr()


def half_cosine(progress: float) -> float:
    """(1 + cos(π p)) / 2, from 1 at ``progress`` 0 to 0 at 1."""
    return (1 + math.cos(math.pi * progress)) / 2
