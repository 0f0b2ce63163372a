"""Spatial arrays of a checkpoint: volumes that a method learned beside its network, and what is needed to place them.

``ssl_state["spatial_arrays"]`` names them; whoever reads, resamples, draws or shares a checkpoint handles every one
alike and knows no method.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.format.shared_folder import read_shared_folder
from nnssl_plugin.errors import UserError

STATE, ENTRY = "ssl_state", "spatial_arrays"
KNOWN_AXES = ("IS", "PA", "LR")
"""Axes (z, y, x) of an image that nnU-Net's reader brought into RAS: from inferior to superior, and so on."""
STORED_AXES = ("z", "y", "x")
"""The same of an image that keeps the orientation of its file, so that the anatomy is not known."""
CENTRE = "centre"
"""The one placement: the array's centre lies on the case's (``transforms/placement.py``)."""
MOST_VALUES = 2**30
"""Of a resampled array: 4 GiB."""


@dataclass(frozen=True)
class SpatialArray:
    """S volumes on one grid, in voxels of a plan's preprocessed cases."""

    values: Tensor
    """(S, *grid) float32, on the CPU."""
    names: tuple[str, ...]
    """What each of the S is of: names of channels."""
    spacing_mm: tuple[float, ...]
    """Along the grid's three axes."""
    axes: tuple[str, ...]
    """Which axis of an image each of the grid's is: those of :data:`KNOWN_AXES` or of :data:`STORED_AXES`."""
    normalisation: tuple[str, ...]
    """The intensity space of each of the S: nnU-Net's normalisation of that channel."""
    placement: str = CENTRE

    @property
    def grid(self) -> tuple[int, ...]:
        """Size in voxels."""
        return tuple(self.values.shape[1:])

    def number_of(self, name: str) -> int | None:
        """Which of the S a channel is, whatever its case; None where it is none of them."""
        folded = [known.casefold() for known in self.names]
        return folded.index(name.casefold()) if name.casefold() in folded else None

    def said(self) -> str:
        """In one line, for people."""
        sizes = (" × ".join(map(str, values)) for values in (self.grid, [round(s, 3) for s in self.spacing_mm]))
        return "{}: {} voxels of {} mm, axes {}, {}".format(
            ", ".join(self.names), *sizes, " ".join(self.axes), ", ".join(dict.fromkeys(self.normalisation))
        )


def declared(arrays: Mapping[str, SpatialArray]) -> dict[str, dict[str, Any]]:
    """What ``ssl_state["spatial_arrays"]`` holds of some arrays, in plain types."""
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in vars(array).items()}
        for name, array in arrays.items()
    }


def as_state(arrays: Mapping[str, SpatialArray]) -> dict[str, Any]:
    """The entry of a checkpoint that declares some arrays and nothing else; empty without any."""
    return {STATE: {ENTRY: declared(arrays)}} if arrays else {}


def spatial_arrays_of(content: Mapping[str, Any], path: Path) -> dict[str, SpatialArray]:
    """The spatial arrays in the content of a checkpoint, each field checked; none where it declares none.

    Args:
        content: what ``read_checkpoint`` or ``read_shared_folder`` gave.
        path: for messages.

    Raises:
        UserError: for a declaration with a missing field, or one of another type or size.
    """
    state = content.get(STATE)
    stated = state.get(ENTRY, {}) if isinstance(state, Mapping) else {}
    if not isinstance(stated, Mapping):
        raise _unreadable(path, ENTRY, "is no block of arrays")
    return {str(name): _array(block, path, str(name)) for name, block in stated.items()}


def read_spatial_arrays(path: str | Path) -> dict[str, SpatialArray]:
    """The spatial arrays of a checkpoint of this package, of weights that ``adapt`` wrote, or of a shared folder.

    Raises:
        UserError: for a file that cannot be read, or a declaration that is not one.
    """
    path = Path(path)
    return spatial_arrays_of(read_shared_folder(path) if path.is_dir() else read_checkpoint(path), path)


def resampled(array: SpatialArray, *, spacing_mm: Sequence[float], axes: Sequence[str]) -> SpatialArray:
    """The array on another spacing and with its axes in another order; its centre stays its centre.

    Linear between voxels; where the new voxels are the larger ones, a voxel is the weighted mean of those around it.
    Known and stored axes are taken for one another by their place in the file.

    Raises:
        UserError: when the result would be larger than 4 GiB.
    """
    order = [_place(axis, array.axes) for axis in axes]
    values, old = array.values.permute(0, *(1 + place for place in order)), [array.spacing_mm[p] for p in order]
    sizes = [max(1, round(n * a / b)) for n, a, b in zip(values.shape[1:], old, spacing_mm, strict=True)]
    if math.prod((len(values), *sizes)) > MOST_VALUES:
        raise UserError(
            f"At a spacing of {list(spacing_mm)} mm an array of {array.said()} has {' × '.join(map(str, sizes))} "
            "voxels, too many.",
            "Adapt to a plan of coarser voxels.",
        )
    for axis, (size, before, now) in enumerate(zip(sizes, old, spacing_mm, strict=True), start=1):
        if (size, before) != (values.shape[axis], now):
            matrix = _weights(values.shape[axis], size, now / before)
            values = torch.tensordot(values, matrix, dims=([axis], [1])).movedim(-1, axis)
    return replace(array, values=values.contiguous(), spacing_mm=tuple(map(float, spacing_mm)), axes=tuple(axes))


def _weights(before: int, now: int, step: float) -> Tensor:
    """(now, before): what each old voxel gives to each new one, ``step`` old voxels apart, with one centre; rows of
    sum 1."""
    places = (torch.arange(now, dtype=torch.float64) - (now - 1) / 2) * step + (before - 1) / 2
    places = places.clamp(0, before - 1)
    distance = (places[:, None] - torch.arange(before, dtype=torch.float64)).abs()
    weights = (1 - distance / max(1.0, step)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def _place(axis: str, axes: Sequence[str]) -> int:
    """Where an axis stands among others, known or stored."""
    return next(place for place, other in enumerate(axes) if _stored(other) == _stored(axis))


def _stored(axis: str) -> int:
    return (KNOWN_AXES if axis in KNOWN_AXES else STORED_AXES).index(axis)


def _array(block: Any, path: Path, name: str) -> SpatialArray:
    if not isinstance(block, Mapping):
        raise _unreadable(path, name, "is no block of values")
    values = block.get("values")
    if not isinstance(values, Tensor) or values.ndim != 4 or not values.is_floating_point() or not values.numel():
        raise _unreadable(path, name, "has no values (S, *grid)")
    if not torch.isfinite(values).all():
        raise _unreadable(path, name, "holds values that are not finite (NaN or infinite)")
    texts = {key: block.get(key) for key in ("names", "normalisation", "axes")}
    for key, listed in texts.items():
        if not isinstance(listed, (list, tuple)) or not all(isinstance(text, str) for text in listed):
            raise _unreadable(path, name, f"has no {key}, a list of texts")
    names, normalisation, axes = (tuple(texts[key]) for key in ("names", "normalisation", "axes"))
    if not len(values) == len(set(names)) == len(names) == len(normalisation):
        raise _unreadable(path, name, "does not name each of its volumes, and the normalisation of each")
    if sorted(axes) not in (sorted(KNOWN_AXES), sorted(STORED_AXES)):
        raise _unreadable(
            path, name, f"has axes {list(axes)}, which are not {KNOWN_AXES} or {STORED_AXES} in any order"
        )
    spacing = block.get("spacing_mm")
    if not isinstance(spacing, (list, tuple)) or len(spacing) != 3 or not all(map(_millimetres, spacing)):
        raise _unreadable(path, name, "has no spacing_mm, three lengths in millimetres")
    if block.get("placement") != CENTRE:
        raise _unreadable(path, name, f"is placed by {block.get('placement')!r}, which is not known")
    values = values.detach().to("cpu", torch.float32)
    return SpatialArray(values, names, tuple(map(float, spacing)), axes, normalisation)


def _millimetres(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-3 <= value <= 1e3


def _unreadable(path: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"{path} holds the spatial array '{name}', which {reason}.",
        "Use the checkpoint that the pretraining wrote, or the folder that export made of it.",
    )
