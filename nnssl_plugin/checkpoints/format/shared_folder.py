"""The folder that weights are shared in: its files, how they hold what a checkpoint holds, and their hashes.

Tensors go to safetensors, everything else to JSON; nothing in it can run code.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_plugin.checkpoints.format.content import check_content
from nnssl_plugin.checkpoints.format.files import read_safetensors
from nnssl_plugin.checkpoints.format.provenance import weights_hash
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, read_json, write_json

MODEL, ALIASES = "model.safetensors", "aliases.json"
STATE, STATE_VALUES = "ssl_state.safetensors", "ssl_state.json"
PLANS, DATASET, PROVENANCE = "plans.json", "dataset.json", "provenance.json"
ADAPTATION_PLAN = "adaptation_plan.json"
"""nnssl's block, under the name by which its repositories hold it."""
RUN = "checkpoint.json"
"""The checkpoint's remaining plain values: trainer, configuration, fold, epochs."""
CARD, HASHES = "README.md", "hashes.json"
TENSOR, TUPLE, PAIRS = "__tensor__", "__tuple__", "__pairs__"
"""Keys of JSON objects that stand for what JSON does not know: a tensor by its name, a tuple, a dict of any keys."""


class TensorStore:
    """Named tensors for a safetensors file, which refuses two names of one memory: each is held once.

    PlainConvUNet has each convolution of its encoder under four keys.
    """

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple, str] = {}
        self._storages: set[int] = set()

    def add(self, name: str, tensor: Tensor) -> str:
        """The name under which the file holds the tensor: ``name``, or that of an earlier one of the same memory."""
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if not tensor.numel():
            place = (name,)
        if place not in self._names:
            while name in self.tensors:  # {"a.b": …} and {"a": {"b": …}} give one name
                name += "_"
            self._names[place] = name
            self.tensors[name] = self._alone(tensor)
        return self._names[place]

    def save(self, path: Path) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        with atomic_path(path) as temporary:  # safetensors alone writes files that only their owner may read
            save_file(self.tensors, temporary, metadata={"format": "pt"})

    def _alone(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, contiguous, in a memory that no other one of the store lies in."""
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in self._storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._storages.add(tensor.untyped_storage().data_ptr())
        return tensor


def encode(value: Any, store: TensorStore, place: str) -> Any:
    """``value`` as JSON holds it; its tensors go to ``store`` under their place in it.

    Raises:
        TypeError: for anything but None, bool, int, float, str, list, tuple, dict and tensors; it names the place.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {TENSOR: store.add(place, value)}
    if isinstance(value, (list, tuple)):
        items = [encode(item, store, f"{place}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in (TENSOR, TUPLE, PAIRS) for key in value):
            return {key: encode(item, store, f"{place}.{key}") for key, item in value.items()}
        keys = [encode(key, store, place) for key in value]
        return {PAIRS: [[k, encode(v, store, f"{place}.{k}")] for k, v in zip(keys, value.values(), strict=True)]}
    raise TypeError(f"{place} is a {type(value).__name__}, which a shared folder cannot hold")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`encode` was given; a tensor of several places is one tensor again."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        return tensors[value[TENSOR]]
    if set(value) == {TUPLE}:
        return tuple(decode(value[TUPLE], tensors))
    if set(value) == {PAIRS}:
        return {decode(key, tensors): decode(item, tensors) for key, item in value[PAIRS]}
    return {key: decode(item, tensors) for key, item in value.items()}


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; on success rename it to ``folder``, else nothing is left.

    Raises:
        UserError: when ``folder`` is there already and not an empty folder.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already.", "Choose another folder with -o, or remove this one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    inside = temporary / folder.name  # mkdtemp makes private folders; one of ours has the usual permissions
    try:
        inside.mkdir()
        yield inside
        if folder.exists():
            folder.rmdir()
        inside.replace(folder)
    finally:
        shutil.rmtree(temporary)


def write_hashes(folder: Path, network_weights: str) -> None:
    """Write ``hashes.json``: SHA-256 of every file of the folder, and of the weights whatever file they are in."""
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    write_json(folder / HASHES, {"files": files, "network_weights": network_weights})


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_folder_json(path: Path) -> Any:
    """A JSON file of the folder.

    Raises:
        UserError: when it is missing or not JSON.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent} holds no {path.name}: it is not a folder that nnssl_plugin exported.",
            "Download all of its files, or name a checkpoint.",
        )
    return read_json(path)


def read_shared_folder(folder: str | Path) -> dict[str, Any]:
    """The checkpoint that a shared folder holds: every file verified, and the weights bit for bit.

    Raises:
        UserError: when a file is missing, not what its hash says, or the weights are not those of the provenance.
    """
    folder = Path(folder)
    hashes = read_folder_json(folder / HASHES)
    try:
        _verify_files(folder, hashes["files"])
        content = _content(folder, state=STATE_VALUES in hashes["files"], plan=ADAPTATION_PLAN in hashes["files"])
        check_content(content, folder)
        recorded = (hashes["network_weights"], content["provenance"].get("weights_sha256"))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        raise UserError(
            f"{folder} is not laid out as nnssl_plugin exports it ({type(error).__name__}: {error}).", DOWNLOAD_AGAIN
        ) from error
    found = weights_hash(content["network_weights"])
    if any(said not in (None, found) for said in recorded):
        raise UserError(
            f"The weights in {folder / MODEL} are not those that were exported (their hash differs).", DOWNLOAD_AGAIN
        )
    return content


def _content(folder: Path, *, state: bool, plan: bool) -> dict[str, Any]:
    """The checkpoint's entries; ``state`` and ``plan`` say whether the folder has the method's and nnssl's."""
    stored, _ = read_safetensors(folder / MODEL)
    run = decode(read_folder_json(folder / RUN), {})
    content = {
        "network_weights": {key: stored[name] for key, name in read_folder_json(folder / ALIASES).items()},
        "init_args": {
            "plans": read_folder_json(folder / PLANS),
            "configuration": run.pop("configuration"),
            "fold": run.pop("fold"),
            "dataset_json": read_folder_json(folder / DATASET),
        },
        "provenance": read_folder_json(folder / PROVENANCE),
        **run,
    }
    if state:
        tensors, _ = read_safetensors(folder / STATE)
        content["ssl_state"] = decode(read_folder_json(folder / STATE_VALUES), tensors)
    if plan:
        content["nnssl_adaptation_plan"] = read_folder_json(folder / ADAPTATION_PLAN)
    return content


def _verify_files(folder: Path, listed: Mapping[str, str]) -> None:
    """Compare every listed file with its hash; the card is for people, who may have filled it in."""
    needed = (*NEEDED, STATE) if STATE_VALUES in listed else NEEDED
    missing = [name for name in needed if name not in listed]
    if missing:
        raise UserError(
            f"{folder / HASHES} does not list {missing[0]}: this is no folder of --format safetensors.",
            "For a folder with a .pth file, name that file.",
        )
    for name, digest in listed.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path} is missing.", DOWNLOAD_AGAIN)
        if file_hash(path) == digest:
            continue
        if name != CARD:
            raise UserError(f"{path} is not the file that was exported (its hash differs).", DOWNLOAD_AGAIN)
        logger.warning("%s was edited after the export.", path)


logger = logging.getLogger(__name__)
NEEDED = (MODEL, ALIASES, PLANS, DATASET, PROVENANCE, RUN)
DOWNLOAD_AGAIN = "Download or copy the folder again; do not use these weights."
