"""Numbers logged once per epoch through nnU-Net's logger, and the alarm when features collapse."""

import math
import sys

import torch
from torch import Tensor

from nnssl_plugin.diagnostics.collapse import effective_rank, feature_std

COLLAPSED_STD = 0.01
"""Spread of the features (1 = isotropic) below which a run is called collapsed."""
SMALLEST_SAMPLE = 4
"""Samples below which the spread says nothing."""
RUN_OF_EPOCHS = ("epoch_start_timestamps", "epoch_end_timestamps")


class EpochLog:
    """Adds series to nnU-Net's logger, which only knows its own, and reads them back.

    Args:
        logger: nnU-Net's ``MetaLogger``; its history is part of every checkpoint.
    """

    def __init__(self, logger):
        self._logger = logger

    def add(self, name: str, value: float, epoch: int) -> None:
        """Log one number of an epoch; a series that begins late is NaN before."""
        series = self._series().setdefault(name, [])
        series.extend([float("nan")] * (epoch - len(series)))
        self._logger.log(name, value, epoch)

    def history(self, epochs: int | None = None) -> dict[str, list]:
        """Every series, cut to the first ``epochs`` entries."""
        return {name: list(series[:epochs]) for name, series in self._series().items()}

    def last(self) -> dict[str, float | None]:
        """The last number of every series, ``None`` for what is not a number (JSON has no NaN)."""
        last = {name: series[-1] for name, series in self._series().items() if series}
        return {name: value if math.isfinite(value) else None for name, value in last.items()}

    def collapse(self, features: list[Tensor], epoch: int, kind: str = "") -> str:
        """Log spread and effective rank of the features (B, F) of an epoch; returns a warning, or ``""``.

        Args:
            features: of every validation batch.
            epoch: the present one.
            kind: of the images, where there are several.
        """
        stacked = torch.cat([f.float() for f in features]) if features else torch.zeros(0)
        if stacked.ndim != 2 or len(stacked) < SMALLEST_SAMPLE:
            return ""
        spread = float(feature_std(stacked))
        ending = f"/{kind}" if kind else ""
        self.add(f"feature_std{ending}", spread, epoch)
        self.add(f"effective_rank{ending}", float(effective_rank(stacked)), epoch)
        if spread > COLLAPSED_STD:
            return ""
        of_kind = f" of {kind}" if kind else ""
        return (
            f"WARNING: the features{of_kind} have collapsed (spread {spread:.4f}; 1 is healthy, 0 means that every "
            "image gives the same features). The loss may fall all the same. Lower lr, raise the batch size, or look "
            "at figures/."
        )

    def summary(self, epoch: int, epochs: int) -> str:
        """One block of text on the epoch that just ended, with the time left at its speed."""
        now = {name: series[epoch] for name, series in self._series().items() if len(series) > epoch}
        duration = now["epoch_end_timestamps"] - now["epoch_start_timestamps"]
        numbers = [f"{name} {value:.4g}" for name, value in now.items() if name not in RUN_OF_EPOCHS]
        lines = ["  ".join(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
        return "\n".join([*lines, f"{duration:.1f} s; about {_duration(duration * (epochs - epoch - 1))} left"])

    def peak_memory(self, device: torch.device) -> float:
        """Largest memory so far in GiB: of the GPU, else of this process (NaN where the system does not tell)."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**30
        try:
            import resource
        except ImportError:  # Windows
            return float("nan")
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def _series(self) -> dict[str, list]:
        return self._logger.local_logger.my_fantastic_logging


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
