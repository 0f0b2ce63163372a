"""Sums of an epoch's loss terms and skipped steps, kept on the device and read once per epoch."""

import torch
from torch import Tensor

from nnssl_plugin.training.distributed import mean_over_ranks


class EpochSums:
    """Adds up named scalars without waiting for the device; steps that were not applied count as skipped.

    The state is a plain dict of tensors, so that a run stopped in mid-epoch goes on with the same sums.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.known: dict[str, Tensor] = {}
        self.applied = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self.first_terms: dict[str, Tensor] = {}  # of that step
        self.first_skipped = torch.full((), -1.0, device=device)  # position in the epoch; -1: none

    def add(self, terms: dict[str, Tensor], applied: Tensor, kind: str = "") -> None:
        """Add the terms of one step.

        Args:
            terms: by name, ``total`` among them.
            applied: () bool, False where the step was skipped.
            kind: of the step's images where there are several: the means of its terms (``NAME/KIND``) are over its own
                steps, beside that of all totals.
        """
        first = ~applied & (self.first_skipped < 0)
        for name, value in terms.items():
            kept = self.first_terms.get(name, torch.zeros((), device=self.device))
            self.first_terms[name] = torch.where(first, value.detach().float(), kept)
        if kind:
            own = {f"{name}/{kind}": value.detach().float() for name, value in terms.items()}
            self.add_known({name: torch.where(applied, value, torch.nan) for name, value in own.items()})
            terms = {"total": terms["total"]}
        for name, value in terms.items():
            value = torch.where(applied, value.detach().float(), 0.0)
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.first_skipped = torch.where(first, self.applied + self.skipped, self.first_skipped)
        self.applied = self.applied + applied
        self.skipped = self.skipped + ~applied
        self.streak = torch.where(applied, 0.0, self.streak + 1)
        self.longest_streak = torch.maximum(self.longest_streak, self.streak)

    def add_known(self, numbers: dict[str, Tensor]) -> None:
        """Add numbers that a batch may not give: NaN counts nowhere."""
        for name, value in numbers.items():
            known = ~value.isnan()
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(known, value.float(), 0.0)
            self.known[name] = self.known.get(name, 0.0) + known.float()

    def means(self) -> dict[str, float]:
        """Means over the applied steps of all ranks; NaN where every step was skipped."""
        if not self.sums:
            return {}
        counts = torch.stack([self.known.get(name, self.applied) for name in self.sums])
        means = mean_over_ranks(torch.stack(list(self.sums.values())) / counts)
        return dict(zip(self.sums, means.tolist(), strict=True))

    def reset(self) -> None:
        """Begin the next epoch; a streak of skipped steps goes on across it."""
        streak = self.streak
        self.__init__(self.device)
        self.streak = self.longest_streak = streak

    def state(self) -> dict:
        """Tensors and names, for the checkpoint."""
        return {
            "sums": dict(self.sums),
            "known": dict(self.known),
            "first_terms": dict(self.first_terms),
            "applied": self.applied,
            "skipped": self.skipped,
            "streak": self.streak,
            "longest_streak": self.longest_streak,
            "first_skipped": self.first_skipped,
        }

    def load(self, state: dict) -> None:
        """Take back what :meth:`state` gave."""
        for name, value in state.items():
            named = isinstance(value, dict)
            setattr(self, name, {k: v.to(self.device) for k, v in value.items()} if named else value.to(self.device))
