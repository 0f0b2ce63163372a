"""Batches of several datasets in one stream: each step is of one of them, the same on every rank."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from nnssl_plugin.data.batch import Batch
from nnssl_plugin.data.batches import StepBatches


class MixedBatches(Dataset):
    """Batch *k* of one rank, drawn from the part that ``order`` names; parts are gone through over and over.

    Args:
        parts: the batches of each dataset.
        order: (steps,) number of the part that each step draws from.
    """

    def __init__(self, parts: Sequence[StepBatches], order: np.ndarray):
        self.parts = list(parts)
        self.order = order
        self._number = np.zeros(len(order), dtype=int)  # of a step among those of its part
        for part in range(len(parts)):
            of_part = order == part
            self._number[of_part] = np.arange(of_part.sum())

    def __getitem__(self, step: int) -> Batch:
        part, number = self.part_of_step(step)
        return part[number]

    def part_of_step(self, step: int) -> tuple[StepBatches, int]:
        """The dataset's batches that a step draws from, and which of them."""
        return self.parts[self.order[step]], int(self._number[step])

    def cases_of_step(self, step: int) -> list[str]:
        """Names of this rank's cases."""
        part, number = self.part_of_step(step)
        return part.cases_of_step(number)

    def cases_of_all_ranks(self, step: int) -> list[str]:
        """Names of the cases of a step, rank after rank."""
        part, number = self.part_of_step(step)
        return part.cases_of_all_ranks(number)
