"""Checkpoint files of plain types: written atomically, read without ever running code that a file brings along."""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.errors import UserError
from nnssl_plugin.files import atomic_path

PLAIN = (bool, int, float, complex, str, bytes)
"""Scalars that are kept; subclasses (np.float64 is a float, np.str_ a str) are reduced to them."""
TORCH_VALUES = (torch.dtype, torch.device, torch.Size)
DAMAGED = (pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError,
           AttributeError, AssertionError)
"""What PyTorch raises for a file that it cannot read; which of them depends on where the damage is."""
NUMPY_KINDS = "?bhilqBHILQefdgFDGSUO"
"""Kinds of NumPy values that the ``logging`` of a stock nnU-Net checkpoint may hold."""


def save_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write ``content`` with ``torch.save`` so that ``torch.load(path, weights_only=True)`` reads it back.

    The file appears whole or not at all. Tensors are stored on the CPU, so a file written on a GPU opens anywhere;
    tensors that share their memory are stored once.

    Raises:
        TypeError: for a value that only unpickling code could read back; the message names its place.
    """
    plain = to_plain(dict(content))
    with atomic_path(path) as temporary:
        torch.save(plain, temporary)


def to_plain(value: Any) -> Any:
    """``value`` in types that ``weights_only=True`` reads: Python scalars, str, list, tuple, dict, set and tensors.

    NumPy scalars become Python scalars, numeric arrays tensors, arrays of strings lists, paths str, parameters
    detached CPU tensors, named tuples tuples, every mapping a dict.

    Raises:
        TypeError: for any other type; the message names its place.
    """
    return _plain(value, "content", {})


def read_checkpoint(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold.

    Stock nnU-Net checkpoints hold NumPy scalars and arrays in their logs; those types are allowed, nothing else.

    Args:
        path: file written by :func:`save_checkpoint`, by nnU-Net or by ``torch.save``.
        device: where the tensors go, whatever device they were saved from.

    Raises:
        UserError: when the file is missing, truncated, not a checkpoint, or would need code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.",
                        "Check the path; training writes fold_X/checkpoint_final.pth.")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location=device, weights_only=True)
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint.",
                        "Give a file with network weights, such as checkpoint_final.pth.")
    return content


def _plain(value: Any, place: str, moved: dict[tuple, Tensor]) -> Any:
    if value is None or isinstance(value, TORCH_VALUES):
        return value
    if isinstance(value, Tensor):
        return _plain_tensor(value, place, moved)
    if isinstance(value, np.generic) and not isinstance(value, PLAIN):
        value = value.tolist()
    for kind in PLAIN:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return _plain_array(value, place, moved)
    if isinstance(value, Mapping):
        return {_plain(k, f"a key of {place}", moved): _plain(v, f"{place}[{k!r}]", moved) for k, v in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(_plain(v, f"{place}[{i}]", moved) for i, v in enumerate(value))
    raise TypeError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds plain types "
                    "only (numbers, strings, lists, dicts, tensors)")


def _plain_tensor(value: Tensor, place: str, moved: dict[tuple, Tensor]) -> Tensor:
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"{place} is a sparse or quantised tensor; a checkpoint holds dense ones")
    value = value.detach()
    if value.device.type != "cpu":
        # encoder and decoder.encoder share their memory: moved once, they still do, and the file stays half the size
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key not in moved:
            moved[key] = value.cpu()
        return moved[key]
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole and type(value) is Tensor else torch.empty(0, dtype=value.dtype).set_(value.clone())


def _plain_array(value: np.ndarray, place: str, moved: dict[tuple, Tensor]) -> Any:
    if value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    return _plain(value.tolist(), place, moved)


def _numpy_globals() -> list:
    """What the pickles of NumPy scalars and arrays call, under the names of NumPy 1 and 2."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed: list = [np.ndarray, np.dtype]
    for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(multiarray.scalar, f"{package}.scalar"), (multiarray._reconstruct, f"{package}._reconstruct")]
    return allowed + sorted({type(np.dtype(kind)) for kind in NUMPY_KINDS}, key=str)


def _unreadable(path: Path, error: Exception) -> UserError:
    called = re.search(r"unsupported global:? (?:GLOBAL )?(\w+(?:\.\w+)+)", str(error), re.IGNORECASE)
    if called:
        return UserError(
            f"{path} would run code when it is opened ({called.group(1)}); it was not opened.",
            "Ask its author for a file of plain tensors, or convert it yourself in a machine you can lose.",
        )
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read: permission denied.", f"chmod u+r {path}")
    return UserError(f"{path} is truncated, damaged or not a checkpoint of PyTorch.",
                     "Copy or download it again, or use an earlier checkpoint of the same folder.")
