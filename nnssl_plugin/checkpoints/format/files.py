"""Checkpoint files of plain types: written atomically, read without ever running code that a file brings along."""

import logging
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.checkpoints.format.content import check_content
from nnssl_plugin.checkpoints.format.pickled import UNKNOWN, check_size, numpy_globals, unsafe_globals
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, disk_errors_in_words, keep_file

logger = logging.getLogger(__name__)
PLAIN = (bool, int, float, complex, str, bytes)
"""Scalars that are kept; subclasses (np.float64 is a float, np.str_ a str) are reduced to them."""
TORCH_VALUES = (torch.dtype, torch.device, torch.Size)
DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    zipfile.BadZipFile,
)
"""What PyTorch raises for a file that it cannot read; which of them depends on where the damage is."""


def save_checkpoint(content: Mapping[str, Any], path: str | Path, *, keep_as: Path | None = None) -> None:
    """Write ``content`` with ``torch.save`` so that ``torch.load(path, weights_only=True)`` reads it back.

    The file appears whole or not at all. Tensors are stored on the CPU, so a file written on a GPU opens anywhere;
    tensors that share their memory are stored once.

    Args:
        content: plain types (:func:`to_plain`).
        path: the file to write.
        keep_as: where the file that ``path`` names until now is kept.

    Raises:
        TypeError: for a value that only unpickling code could read back; the message names its place.
        UserError: the disk is full or may not be written; the file that ``path`` names until now is still there.
    """
    plain = to_plain(dict(content))
    with disk_errors_in_words(path), atomic_path(path) as temporary:
        _write(plain, temporary)
        if keep_as is not None:
            keep_file(Path(path), keep_as)


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
        UserError: when the file is missing, truncated, not a checkpoint, would need code to be run, or holds what
            :func:`~nnssl_plugin.checkpoints.format.content.check_content` refuses; when there is no such device.
    """
    path = _existing(path)
    _check_device(torch.device(device))
    try:
        check_size(path)
        with torch.serialization.safe_globals(numpy_globals()):
            content = torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path} does not fit into the memory of {device}: {error}.", "Use -device cpu.") from error
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    return _checkpoint(content, path)


def read_trusted(path: str | Path) -> dict[str, Any]:
    """Unpickle a checkpoint, which runs whatever code it holds; only for files whose origin the user vouches for.

    What it calls is logged before (:func:`unsafe_globals`). A pickled network is read as its state dict.

    Args:
        path: file written by ``torch.save``.

    Returns:
        the file's content, tensors on the CPU.

    Raises:
        UserError: when the file is missing, damaged, or needs a package that is not installed.
    """
    path = _existing(path)
    for name in unsafe_globals(path):
        logger.warning("%s runs %s", path.name, name)
    try:
        check_size(path)
        content = torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{path} needs code that is not installed: {error}.",
            "Install the package that wrote it, in a machine that you can lose, and try again.",
        ) from error
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    if isinstance(content, torch.nn.Module):
        content = {"state_dict": content.state_dict()}
    return _checkpoint(content, path)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is of the safetensors format, by its content: eight bytes of length, then JSON.

    Raises:
        UserError: when it does not exist, or is named ``.safetensors`` and is something else.
    """
    path = _existing(path)
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) == 9 and start[8:] == b"{" and length <= path.stat().st_size - 8:
        return True
    if path.suffix == ".safetensors":
        raise UserError(
            f"{path} is named .safetensors but is not of that format, or was cut short.",
            "Download it again. If it is a checkpoint of PyTorch, rename it to .pth: no code in it is run.",
        )
    return False


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU.

    Raises:
        UserError: when the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()  # the handle is no mapping: it cannot be iterated
            tensors, metadata = {key: file.get_tensor(key) for key in names}, dict(file.metadata() or {})
    except (SafetensorError, *DAMAGED) as error:
        raise _unreadable(path, error) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors.", "Download it again.")
    return tensors, metadata


def _write(content: dict[str, Any], path: Path) -> None:
    """``torch.save``; its own writer hides the system's error, which one through a Python file has as its context."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    if path.exists():
        raise UserError(f"{path} is not a file.", "Name the file with the weights, such as checkpoint_final.pth.")
    raise UserError(f"There is no checkpoint {path}.", "Check the path; training writes fold_X/checkpoint_final.pth.")


def _checkpoint(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a checkpoint.",
            "Give a file with network weights, such as checkpoint_final.pth.",
        )
    check_content(content, path)
    return content


def _check_device(device: torch.device) -> None:
    """Refuse a device that this machine does not have, before the file is blamed for it."""
    if device.type in ("cpu", "meta"):
        return
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available() or (device.index or 0) >= module.device_count():
        raise UserError(
            f"There is no usable GPU here: PyTorch {torch.__version__} cannot use {device}.",
            "Use -device cpu, or see what is wrong with the GPU: nnssl_plugin doctor",
        )


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
    raise TypeError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds plain types "
        "only (numbers, strings, lists, dicts, tensors)"
    )


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


def _unreadable(path: Path, error: Exception) -> UserError:
    called = _called(path)
    if called:
        return UserError(
            f"{path} would run code when it is opened ({', '.join(called[:3])}); it was not opened.",
            "Ask its author for a file of plain tensors. If you trust where it comes from: "
            f"nnssl_plugin import --trust {path} -o CHECKPOINT (it lists first what it will run).",
        )
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read: permission denied.", f"chmod u+r {path}")
    if path.name.endswith(".model.pkl"):
        return UserError(
            f"{path} is nnU-Net v1's description of a model, not its weights.",
            "The weights lie beside it, in the .model file; v2 has no network for them.",
        )
    return UserError(
        f"{path} is truncated, damaged or not a checkpoint of PyTorch.",
        "Copy or download it again, or use an earlier checkpoint of the same folder.",
    )


def _called(path: Path) -> list[str]:
    """What a file that could not be read would have called."""
    try:
        return [name for name in unsafe_globals(path) if name != UNKNOWN]
    except (UserError, *DAMAGED):
        return []
