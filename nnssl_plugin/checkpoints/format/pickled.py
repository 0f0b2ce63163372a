"""What a pickled file would do when it is opened, told without opening it."""

import io
import logging
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from nnssl_plugin.errors import UserError

logger = logging.getLogger(__name__)
LARGEST_EXPANSION = 4
"""Times its own size that a file may unpack to; PyTorch does not compress, and weights hardly shrink."""
SLACK = 2**20
"""Bytes that a small file may unpack to in any case."""
LEGACY_PICKLES = 5
"""Pickles at the head of PyTorch's format before 1.6: number, version, system, content, names of the storages."""
NUMPY_KINDS = "?bhilqBHILQefdgFDGSUO"
"""Kinds of NumPy values that the ``logging`` of a stock nnU-Net checkpoint may hold."""
DAMAGED_ARCHIVE = (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError, ValueError)
"""What ``zipfile`` raises for archives that are cut short, damaged, encrypted or compressed in an unknown way."""
ARCHIVE = b"PK\x03\x04"
MARK = object()
"""Stands on the simulated stack where the pickle machine keeps its own mark."""
STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
UNKNOWN = "names that are put together while the file is opened"


def check_size(path: Path) -> None:
    """Refuse an archive that would unpack to far more than it is.

    Raises:
        UserError: with both sizes.
    """
    if not _is_archive(path):
        return
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > LARGEST_EXPANSION * size + SLACK:
        raise UserError(
            f"{path} has {size / 2**20:.1f} MiB and claims to unpack to {unpacked / 2**20:,.0f} MiB; it "
            "was not opened.",
            "Ask its author for a file that torch.save wrote, which is not compressed.",
        )


def unsafe_globals(path: str | Path) -> list[str]:
    """Functions and classes that opening a file would call beyond what builds tensors and NumPy values.

    Nothing is run to tell: the pickle's instructions are read with the stack and memo that they would work on, in both
    of PyTorch's formats.

    Args:
        path: a file written by ``torch.save`` or ``pickle``.

    Returns:
        dotted names in alphabetical order; empty for a file that ``weights_only=True`` opens.

    Raises:
        UserError: when the file holds no pickle.
    """
    path = Path(path)
    found: set[str] = set()
    pickles = 0
    try:
        for file in _pickles(path):
            names = _globals(file)
            found |= names
            pickles += names != {UNKNOWN}
    except DAMAGED_ARCHIVE as error:
        raise _no_pickle(path) from error
    if not pickles:
        raise _no_pickle(path)
    return sorted(name for name in found if not _is_allowed(name))


def _is_allowed(name: str) -> bool:
    """Whether PyTorch, or NumPy's numbers and arrays, allow a name; asked with an archive that does nothing but name
    it."""
    module, _, attribute = name.rpartition(".")
    if not module or not name.isprintable() or " " in name:
        return False
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
        file.writestr("archive/version", "3\n")
    archive.seek(0)
    with torch.serialization.safe_globals(numpy_globals()):
        return not torch.serialization.get_unsafe_globals_in_checkpoint(archive)


def numpy_globals() -> list[Any]:
    """What the pickles of NumPy scalars and arrays call, under the names of NumPy 1 and 2.

    They are allowed besides PyTorch's own: stock nnU-Net checkpoints hold such values in their logs.
    """
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed: list = [np.ndarray, np.dtype]
    for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(multiarray.scalar, f"{package}.scalar"), (multiarray._reconstruct, f"{package}._reconstruct")]
    return allowed + sorted({type(np.dtype(kind)) for kind in NUMPY_KINDS}, key=str)


def _no_pickle(path: Path) -> UserError:
    return UserError(
        f"{path} holds no pickle that can be read: it is truncated, damaged or no checkpoint of PyTorch.",
        "Copy or download it again.",
    )


def _pickles(path: Path) -> Iterator[BinaryIO]:
    """Every pickle in a file, as a stream that stands at its beginning."""
    check_size(path)
    if _is_archive(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():  # not by name: a name may be there twice, and PyTorch ignores its case
                if entry.filename.lower().endswith(".pkl"):
                    yield io.BytesIO(archive.read(entry))
        return
    with open(path, "rb") as file:
        for _ in range(LEGACY_PICKLES):
            if not file.peek(1):
                return
            yield file


def _is_archive(path: Path) -> bool:
    """What PyTorch takes for an archive; ``zipfile`` also accepts one behind something else."""
    with open(path, "rb") as file:
        return file.read(len(ARCHIVE)) == ARCHIVE


class _Machine:
    """The pickle machine's stack and memo, with the strings on them; every other value is None."""

    def __init__(self):
        self.found: set[str] = set()
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do what an instruction does to the stack, and note the names that it looks up."""
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            self.found.add(argument.replace(" ", "."))
        elif name == "STACK_GLOBAL":
            parts = self._stack[-2:]
            self.found.add(".".join(parts) if len(parts) == 2 and all(map(_is_text, parts)) else UNKNOWN)
        elif name.startswith("EXT"):
            self.found.add(f"copyreg extension {argument}")
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        pushed = self._pushed(opcode, argument)
        self._pop(opcode)
        self._stack += pushed

    def _pushed(self, opcode: pickletools.OpcodeInfo, argument: Any) -> list[Any]:
        name = opcode.name
        if name in STRINGS:
            return [argument]
        if name in ("GET", "BINGET", "LONG_BINGET"):
            return [self._memo[argument]]
        if name in ("DUP", "MEMOIZE"):
            return [self._stack[-1]] * len(opcode.stack_after)
        return [MARK if entry is pickletools.markobject else None for entry in opcode.stack_after]

    def _pop(self, opcode: pickletools.OpcodeInfo) -> None:
        before = opcode.stack_before
        count = len(before)
        if pickletools.markobject in before:
            while self._stack.pop() is not MARK:
                pass
            count = before.index(pickletools.markobject)
        if count:
            del self._stack[-count:]


def _globals(file: BinaryIO) -> set[str]:
    """Names that one pickle looks up; leaves the stream behind its end."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode, argument)
    except (ValueError, LookupError) as error:  # cut short, or damaged on purpose: what comes next cannot be told
        logger.debug("a pickle ends early: %s", error)
        machine.found.add(UNKNOWN)
    return machine.found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
