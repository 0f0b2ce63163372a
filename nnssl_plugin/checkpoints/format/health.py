"""How a training was doing at its end: the last numbers of its log, from a checkpoint or from what was exported."""

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json

SERIES = ("feature_std", "effective_rank", "train_losses", "val_losses", "ema_fg_dice")
"""Series of nnU-Net's log whose last number counts."""
SUM = "skipped_steps"
"""The series that is summed."""
ENTRY = "health"
"""Entry of a checkpoint without a log that holds the numbers."""


def health_of(content: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The last finite numbers of the log, else of what was exported with the weights, else of ``quality.json``.

    Args:
        content: the checkpoint's entries.
        path: its file, beside which the training wrote ``quality.json``, or its folder.
    """
    log = content.get("logging")
    log = log if isinstance(log, Mapping) else {}
    series = {name: _numbers(log.get(name)) for name in (*SERIES, SUM)}
    logged = {name: sum(numbers) if name == SUM else numbers[-1] for name, numbers in series.items() if numbers}
    exported = content.get(ENTRY)
    stated = _quality(path) | (dict(exported) if isinstance(exported, Mapping) else {}) | logged
    return {name: float(stated[name]) for name in (*SERIES, SUM) if _is_number(stated.get(name))}


def _quality(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "quality.json"
    try:
        content = read_json(file) if file.is_file() else {}
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _numbers(series: Any) -> list[float]:
    """The finite numbers of a logged series."""
    return [float(value) for value in series if _is_number(value)] if isinstance(series, (list, tuple)) else []


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
