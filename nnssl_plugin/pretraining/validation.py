"""What an epoch's validation batches say: terms of the loss, diagnostics and collapse, of each kind of images."""

import torch
from torch import Tensor

from nnssl_plugin.training.epoch_log import EpochLog
from nnssl_plugin.training.epoch_sums import EpochSums


class ValidationNumbers:
    """The numbers of one epoch; with several kinds of images, named ``NAME/KIND`` beside the total of all.

    Args:
        device: where the numbers are.
        several: whether there are several kinds.
    """

    def __init__(self, device: torch.device, *, several: bool):
        self.device = device
        self.several = several
        self._terms, self._measured = EpochSums(device), EpochSums(device)
        self._features: dict[str, list[Tensor]] = {}

    @property
    def batches(self) -> int:
        """Batches so far."""
        return sum(map(len, self._features.values()))

    def add(self, kind: str, terms: dict[str, Tensor], diagnostics: dict[str, Tensor]) -> bool:
        """Add a batch; returns whether it is the first of its kind. ``features`` (B, F) feeds the collapse measures."""
        measured = dict(diagnostics)
        of_kind = self._features.setdefault(kind, [])
        of_kind.append(measured.pop("features", torch.zeros(0, device=self.device)))
        always = torch.ones((), dtype=torch.bool, device=self.device)
        self._terms.add(terms, always, kind if self.several else "")
        ending = f"/{kind}" if self.several else ""
        self._measured.add_known({name + ending: value for name, value in measured.items()})
        return len(of_kind) == 1

    def log_to(self, log: EpochLog, epoch: int) -> list[str]:
        """Log the means of all ranks and this rank's collapse measures; returns warnings."""
        means = self._terms.means()
        log.add("val_losses", means.pop("total", float("nan")), epoch)
        for prefix, numbers in (("val", means), ("diagnostics", self._measured.means())):
            for name, value in numbers.items():
                log.add(f"{prefix}/{name}", value, epoch)
        warnings = (
            log.collapse(features, epoch, kind if self.several else "") for kind, features in self._features.items()
        )
        return [warning for warning in warnings if warning]
