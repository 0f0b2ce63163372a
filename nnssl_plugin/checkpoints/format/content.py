"""What a file's content may be made of, whoever wrote it: dense tensors, blocks that are not nested without end."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_plugin.errors import UserError

DEEPEST = 64
"""Levels of blocks and lists within one another; checkpoints have about ten."""
MOST_VALUES = 10_000_000
"""Values in all blocks and lists together, those that are named twice counted twice."""
LARGEST_REPEATED = 2**28
"""Bytes up to which a tensor may be larger than its storage (positions are often stored expanded)."""


def check_content(content: Any, path: Path) -> None:
    """Refuse a content that nothing can be done with, or that takes endless time or memory to look at.

    Raises:
        UserError: for blocks nested too deeply (or within themselves), for too many values, for tensors that are
            sparse, quantised or without values (the meta device), and for tensors that claim far more memory than the
            file holds for them.
    """
    if _Walk(path).measure(content, "", DEEPEST)[0] > MOST_VALUES:
        raise UserError(f"{path} holds more than {MOST_VALUES:,} values besides its tensors.", ANOTHER)


class _Walk:
    """Counts the values of a content and looks at its tensors; a block that is named often is visited once."""

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[int, tuple[int, int]] = {}

    def measure(self, block: Any, place: str, depth: int) -> tuple[int, int]:
        """Number of values in a block, and its levels, of which at most ``depth`` may be."""
        if id(block) not in self._known:
            if depth == 0:
                raise self._too_deep()
            count, levels = 1, 0
            for name, entry in _entries(block) or ():
                below, further = self._entry(entry, place, name, depth - 1)
                count, levels = count + below, max(levels, further)
            self._known[id(block)] = count, levels + 1
        if self._known[id(block)][1] > depth:
            raise self._too_deep()
        return self._known[id(block)]

    def _entry(self, entry: Any, place: str, name: Any, depth: int) -> tuple[int, int]:
        if isinstance(entry, Tensor):
            _check_tensor(entry, self.path, f"{place}{name}")
        if _entries(entry) is None:
            return 1, 0
        return self.measure(entry, f"{place}{name}.", depth)

    def _too_deep(self) -> UserError:
        return UserError(f"{self.path} holds blocks that are nested more than {DEEPEST} deep.", ANOTHER)


def _entries(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple, set, frozenset)) else None


def _check_tensor(value: Tensor, path: Path, place: str) -> None:
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise UserError(f"{path} holds {place} as a sparse, nested or quantised tensor.", DENSE)
    if value.is_meta:
        raise UserError(f"{path} holds {place} without its values (on PyTorch's meta device).", DENSE)
    size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if size > LARGEST_REPEATED and size > stored:
        raise UserError(
            f"{path} claims {size / 2**20:,.0f} MiB for the tensor {place} and holds {stored / 2**20:,.1f}.", ANOTHER
        )


ANOTHER = "Ask its author for another file."
DENSE = "Ask its author for a file of dense tensors with their values: torch.save(network.state_dict(), FILE)."
