"""A pretraining checkpoint → a folder that can be given away: weights, plan, provenance, model card, hashes.

Nothing in it names a case or a place on this machine: fields that may are left out, and values that do are removed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.health import ENTRY as HEALTH
from nnssl_plugin.checkpoints.format.health import health_of
from nnssl_plugin.checkpoints.format.provenance import weights_hash
from nnssl_plugin.checkpoints.format.shared_folder import (
    ADAPTATION_PLAN,
    ALIASES,
    CARD,
    DATASET,
    MODEL,
    PLANS,
    PROVENANCE,
    RUN,
    STATE,
    STATE_VALUES,
    TensorStore,
    encode,
    new_folder,
    write_hashes,
)
from nnssl_plugin.checkpoints.format.spatial_arrays import as_state, spatial_arrays_of
from nnssl_plugin.checkpoints.format.tensors import check_finite
from nnssl_plugin.checkpoints.sharing.libraries import TIMM, TORCHVISION, Library, weights_for
from nnssl_plugin.checkpoints.sharing.model_card import PaperLike, model_card, read_results
from nnssl_plugin.checkpoints.sources.description import ENTRIES, check_fields, check_plan, check_provenance, unreadable
from nnssl_plugin.checkpoints.sources.state_dicts import is_state_dict
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json

DATASET_FIELDS = (
    "channel_names",
    "modality",
    "labels",
    "regions_class_order",
    "numTraining",
    "file_ending",
    "overwrite_image_reader_writer",
    "licence",
    "name",
)
"""Fields of ``dataset.json`` that are exported; ``dataset`` lists every case, and free text may name anyone."""
RUN_FIELDS = ("trainer_name", "current_epoch", "inference_allowed_mirroring_axes", "citations", HEALTH)
LOCAL_PATH = re.compile(r"(?<![\w:/.)\]}])(?:~[\w-]*[/\\]|/(?=\w)|[A-Za-z]:[/\\]|\\\\)|file://", re.ASCII)
"""Where an absolute path begins in a text: /home, ~/, C:\\, \\\\server and file:// do, https://… and a/b do not."""
REMOVED = "(a path on the exporting machine, removed)"
PLACE_OF_PLANS = "init_args.plans"
"""Where an entry with such a value is left out, so that its default holds, rather than replaced."""
PRETRAINED, NNSSL_CHECKPOINT, ENCODER = "pretrained_weights.pth", "checkpoint_final.pth", "encoder.pth"


@dataclass(frozen=True)
class Exported:
    """What :func:`export_checkpoint` wrote."""

    folder: Path
    weights_sha256: str
    removed: tuple[str, ...]
    """Places of values that held a local path."""


def export_checkpoint(
    path: str | Path,
    folder: str | Path,
    *,
    layout: str = "safetensors",
    results: Sequence[str] = (),
    licence: str | None = None,
    papers: Mapping[str, PaperLike] | None = None,
) -> Exported:
    """Write a pretraining checkpoint as a folder that others can use; it appears whole or not at all.

    The optimiser's state is not exported: a shared pretraining can be fine-tuned and built upon, not resumed.

    Args:
        path: the checkpoint (``checkpoint_final.pth`` of a pretraining).
        folder: the folder to write.
        layout: ``safetensors`` (``nnssl_plugin import`` takes it back), ``nnunet`` (one file for stock nnU-Net's
            ``-pretrained_weights``), ``nnssl`` (a repository as nnssl and nnU-Net's fine-tuning read it), or
            ``torchvision`` or ``timm`` (the encoder alone in their names).
        results: ``[NAME=]summary.json`` of nnU-Net, whose means the model card shows.
        licence: SPDX identifier of the weights' licence; default: what the provenance says.
        papers: method → its paper, for the BibTeX entries.

    Raises:
        UserError: for a file that is no pretraining checkpoint, a damaged summary, or a folder that is there.
    """
    checkpoint = read_checkpoint(path)
    content, removed = shareable(checkpoint, Path(path))
    content[HEALTH] = health_of(checkpoint, Path(path))
    check_finite(content["network_weights"], str(path))
    if licence is not None:
        content["provenance"]["licence"] = licence
    recorded, found = content["provenance"].get("weights_sha256"), weights_hash(content["network_weights"])
    if recorded is not None and recorded != found:
        raise UserError(
            f"The weights in {path} are not those that its provenance describes (their hash differs).",
            "Export the checkpoint that the pretraining wrote.",
        )
    card = model_card(
        content["provenance"],
        layout=layout,
        weights=content["network_weights"],
        sha256=found,
        results=[read_results(result) for result in results],
        papers=papers or {},
        health=content[HEALTH],
        arrays=spatial_arrays_of(content, Path(path)) if layout in WITH_ARRAYS else {},
    )
    with new_folder(folder) as temporary:
        WRITERS[layout](content, temporary)
        (temporary / CARD).write_text(card, encoding="utf-8")
        write_hashes(temporary, found)
    return Exported(Path(folder), found, removed)


def shareable(checkpoint: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What of a checkpoint is shared, and the places from which a local path was removed.

    Returns:
        a checkpoint without optimiser, log and case names, which ``importing.read_shared_folder`` gives back.

    Raises:
        UserError: when it is no checkpoint of a pretraining, or holds values that are not plain.
    """
    weights, provenance = checkpoint.get("network_weights"), checkpoint.get("provenance")
    arguments = checkpoint.get("init_args")
    if not is_state_dict(weights) or not isinstance(provenance, Mapping) or not isinstance(arguments, Mapping):
        raise UserError(
            f"{path} is not the checkpoint of a pretraining: it has no provenance or no plan.",
            "Give its checkpoint_final.pth. For a fine-tuned model: nnssl_plugin export --stock",
        )
    check_fields(checkpoint, ENTRIES, path, "")
    check_provenance(provenance, path)
    check_plan(arguments.get("plans"), arguments.get("configuration"), path)
    if not isinstance(arguments.get("dataset_json"), Mapping):
        raise unreadable(path, "its init_args hold no dataset_json")
    removed: list[str] = []
    public = {
        **{key: checkpoint[key] for key in RUN_FIELDS if key in checkpoint},
        "init_args": {
            "plans": arguments["plans"],
            "configuration": arguments["configuration"],
            "fold": arguments.get("fold"),
            "dataset_json": shared_dataset_json(arguments["dataset_json"]),
        },
        **{key: checkpoint[key] for key in ("ssl_state", "nnssl_adaptation_plan") if key in checkpoint},
        "provenance": _as_json_holds_it(provenance, path),
    }
    for name in ("init_args", "nnssl_adaptation_plan"):
        _as_json_holds_it(public.get(name), path, name)
    return {"network_weights": dict(weights), **without_local_paths(public, "", removed)}, tuple(removed)


def _as_json_holds_it(block: Any, path: Path, name: str = "provenance") -> Any:
    """A block as it reads back from JSON.

    Raises:
        UserError: when it holds something else.
    """
    try:
        return json.loads(json.dumps(block))
    except (TypeError, ValueError, RecursionError) as error:
        raise unreadable(path, f"{name} holds more than JSON can ({error})") from error


def shared_dataset_json(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """``dataset.json`` without the names of cases and without free text."""
    return {key: dataset_json[key] for key in DATASET_FIELDS if key in dataset_json}


def without_local_paths(value: Any, place: str, removed: list[str]) -> Any:
    """The value with every text that holds a local path replaced; entries whose key holds one are left out.

    Args:
        value: any nesting of plain types.
        place: where it stands in the checkpoint (``""`` is the checkpoint itself).
        removed: gets the place of every value that was removed.
    """
    if isinstance(value, str) and LOCAL_PATH.search(value):
        removed.append(place)
        return REMOVED
    if isinstance(value, Mapping):
        public = {}
        for key, item in value.items():
            below = f"{place}.{key}" if place else str(key)
            if isinstance(key, str) and LOCAL_PATH.search(key):
                removed.append(f"a key of {place}")
                continue
            public[key] = without_local_paths(item, below, removed)
            if public[key] is REMOVED and below.startswith(PLACE_OF_PLANS):
                del public[key]
        return public
    if isinstance(value, (list, tuple)):
        return type(value)(without_local_paths(item, f"{place}[{i}]", removed) for i, item in enumerate(value))
    return value


def _write_shared(content: Mapping[str, Any], folder: Path) -> None:
    """Weights and state as safetensors, the rest as JSON."""
    store = TensorStore()
    weights: Mapping[str, Tensor] = content["network_weights"]
    write_json(folder / ALIASES, {key: store.add(key, tensor) for key, tensor in weights.items()})
    store.save(folder / MODEL)
    if "ssl_state" in content:
        state = TensorStore()
        write_json(folder / STATE_VALUES, encode(content["ssl_state"], state, "ssl_state"))
        state.save(folder / STATE)
    arguments = content["init_args"]
    write_json(folder / PLANS, arguments["plans"])
    write_json(folder / DATASET, arguments["dataset_json"])
    write_json(folder / PROVENANCE, content["provenance"])
    if "nnssl_adaptation_plan" in content:
        write_json(folder / ADAPTATION_PLAN, content["nnssl_adaptation_plan"])
    run = {key: content[key] for key in RUN_FIELDS if key in content}
    run |= {"configuration": arguments["configuration"], "fold": arguments["fold"]}
    write_json(folder / RUN, encode(run, TensorStore(), "checkpoint"))


def _write_nnunet(content: Mapping[str, Any], folder: Path) -> None:
    """One file with the complete network, for stock nnU-Net's ``-pretrained_weights``; the plan beside it."""
    kept = {key: content[key] for key in ("network_weights", "provenance", HEALTH)}
    save_checkpoint(kept | as_state(spatial_arrays_of(content, folder)), folder / PRETRAINED)
    write_json(folder / PLANS, content["init_args"]["plans"])


def _write_nnssl(content: Mapping[str, Any], folder: Path) -> None:
    """The files that ``nnUNetv2_preprocess_like_nnssl`` downloads from a repository of nnssl's.

    Raises:
        UserError: when the checkpoint does not say how to find its encoder.
    """
    block = content.get("nnssl_adaptation_plan")
    if block is None:
        raise UserError("The checkpoint has no nnssl_adaptation_plan.", "Use --format safetensors or nnunet.")
    kept = ("network_weights", "nnssl_adaptation_plan", "citations", "provenance", "trainer_name", HEALTH)
    arrays = as_state(spatial_arrays_of(content, folder))
    save_checkpoint({key: content[key] for key in kept if key in content} | arrays, folder / NNSSL_CHECKPOINT)
    write_json(folder / ADAPTATION_PLAN, block | {"trainer_name": content.get("trainer_name")})
    write_json(folder / "config.json", block["architecture_plans"])


def _write_for(library: Library) -> Callable[[Mapping[str, Any], Path], None]:
    """What writes the encoder for a library: a plain state dict, and the plan that tells its preprocessing."""

    def write(content: Mapping[str, Any], folder: Path) -> None:
        save_checkpoint(weights_for(library, content), folder / ENCODER)
        write_json(folder / PLANS, content["init_args"]["plans"])

    return write


WRITERS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "safetensors": _write_shared,
    "nnunet": _write_nnunet,
    "nnssl": _write_nnssl,
    "torchvision": _write_for(TORCHVISION),
    "timm": _write_for(TIMM),
}
"""``--format`` → what writes its files."""
WITH_ARRAYS = ("safetensors", "nnunet", "nnssl")
"""Layouts that hold the checkpoint's spatial arrays beside the weights."""
