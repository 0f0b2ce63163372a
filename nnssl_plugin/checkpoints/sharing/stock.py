"""A fine-tuned model → a model folder whose trainer is nnU-Net's own: it predicts where this package is not installed.

Prediction takes the network from the plan and the trainer's class from the checkpoint. Where the plan builds the
trained network, nnU-Net's trainer predicts the same.
"""

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import OWN_BLOCKS
from nnssl_plugin.checkpoints.format.shared_folder import new_folder
from nnssl_plugin.checkpoints.sharing.export import PLACE_OF_PLANS, shared_dataset_json, without_local_paths
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

TRAINER = "nnUNetTrainer"
FINAL = "checkpoint_final.pth"
LIBRARY = "dynamic_network_architectures."
"""Package of the networks that every nnU-Net has."""


@dataclass(frozen=True)
class StockModel:
    """What :func:`export_stock` wrote."""

    folder: Path
    folds: tuple[str, ...]
    zip: Path | None


def export_stock(model: str | Path, folder: str | Path, *, archive: str | Path | None = None) -> StockModel:
    """Write a fine-tuned model as one of nnU-Net's own trainer, below ``folder``, as nnU-Net lays out its results.

    Args:
        model: a model folder (``TRAINER__PLANS__CONFIG``; all of its folds that are complete), or the
            ``fold_X/checkpoint_final.pth`` of one.
        folder: where ``DatasetXXX_NAME/nnUNetTrainer__PLANS__CONFIG`` is written; it may be ``nnUNet_results``.
        archive: also write a zip that ``nnUNetv2_install_pretrained_model_from_zip`` installs.

    Raises:
        UserError: for a folder that is no trained model, a network that its plan does not build on every machine, or
            a model that is there already.
    """
    source, checkpoints = _folds(Path(model))
    plans = without_local_paths(_read(source / "plans.json"), PLACE_OF_PLANS, [])
    plans = {key: value for key, value in plans.items() if key not in OWN_BLOCKS}
    dataset_json = shared_dataset_json(_read(source / "dataset.json"))
    configuration = source.name.split("__")[-1]
    expected = _expected_shapes(plans, configuration, dataset_json)
    target = Path(folder) / plans["dataset_name"] / f"{TRAINER}__{plans['plans_name']}__{configuration}"
    with new_folder(target) as temporary:
        write_json(temporary / "plans.json", plans)
        write_json(temporary / "dataset.json", dataset_json)
        fingerprint = source / "dataset_fingerprint.json"
        if fingerprint.is_file():
            shutil.copyfile(fingerprint, temporary / fingerprint.name)
        for path in tqdm(checkpoints, desc="folds", unit="fold"):
            content = _stock_checkpoint(path, plans, configuration, dataset_json, expected)
            save_checkpoint(content, temporary / path.parent.name / FINAL)
    if archive is not None:
        _zip(target, Path(archive))
    return StockModel(target, tuple(path.parent.name for path in checkpoints), Path(archive) if archive else None)


def _folds(model: Path) -> tuple[Path, list[Path]]:
    """The model folder, and its complete folds' checkpoints."""
    if model.is_file():
        return model.resolve().parent.parent, [model.resolve()]
    model = model.resolve()
    found = sorted(model.glob(f"fold_*/{FINAL}"))
    if not found:
        raise UserError(
            f"{model} holds no fold_X/{FINAL}.",
            "Name nnUNet_results/DatasetXXX_NAME/TRAINER__PLANS__CONFIG of a model with finished folds.",
        )
    return model, found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"There is no {path}: {path.parent} is not a model folder of nnU-Net.",
            "Name nnUNet_results/DatasetXXX_NAME/TRAINER__PLANS__CONFIG, or a checkpoint in its folds.",
        )
    return read_json(path, dict)


def _expected_shapes(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> dict[str, tuple]:
    """Key → shape of every tensor of the network that nnU-Net builds from the plan."""
    network = build_network(plans, configuration, dataset_json, device="meta")
    if not type(network).__module__.startswith(LIBRARY):
        raise UserError(
            f"The plan's network, {type(network).__module__}.{type(network).__name__}, is not one that every nnU-Net "
            "has.",
            "It predicts only where this package is installed: share the model folder as it is.",
        )
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _stock_checkpoint(
    path: Path, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], expected: Mapping[str, tuple]
) -> dict[str, Any]:
    """What prediction reads of a checkpoint, in plain types, under the name of nnU-Net's trainer."""
    content = read_checkpoint(path)
    weights, arguments = content.get("network_weights"), content.get("init_args", {})
    if not isinstance(weights, Mapping) or arguments.get("configuration") != configuration:
        raise UserError(f"{path} is not a checkpoint of {configuration}.", "Name the folder that nnU-Net trained in.")
    if "ssl_state" in content:
        raise UserError(f"{path} is a pretraining; it segments nothing.", "Export it without --stock.")
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if found != expected:
        different = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise UserError(
            f"{path} holds another network than its plan builds ({len(different)} tensors, such as "
            f"{different[0]}): its trainer changed it.",
            "It needs its own trainer to predict.",
        )
    return {
        "network_weights": dict(weights),
        "init_args": {
            "plans": plans,
            "configuration": configuration,
            "fold": arguments.get("fold"),
            "dataset_json": dataset_json,
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": content.get("inference_allowed_mirroring_axes"),
        "current_epoch": content.get("current_epoch"),
    }


def _zip(model: Path, archive: Path) -> None:
    """The model below its dataset's folder; not compressed, as weights hardly shrink."""
    results = model.parent.parent
    with atomic_path(archive) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            file.write(path, path.relative_to(results))
