"""What can stand in for a modality that a case lacks: a template of a checkpoint, or the mean of the training cases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from tqdm import tqdm

from nnssl_plugin.checkpoints.adaptation.arrays import fit_arrays
from nnssl_plugin.checkpoints.format.provenance import describe_input
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray, read_spatial_arrays
from nnssl_plugin.data.cases import available_channels
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.planes import grid_axes
from nnssl_plugin.nnunet.plans import resolve_configuration
from nnssl_plugin.nnunet.raw_folders import raw_folder
from nnssl_plugin.transforms.placement import centre_offset


def templates_for(
    checkpoint: str | Path, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> SpatialArray:
    """The templates of a checkpoint on the grid of a plan.

    Args:
        checkpoint: of a pretraining or a fine-tuning with templates, weights that ``adapt`` wrote, or a shared folder.
        plans: of the model that will see the images.
        configuration: of the plan.
        dataset_json: of the dataset.

    Raises:
        UserError: the file cannot be read, or holds none, or several arrays.
    """
    fitted, _ = fit_arrays(read_spatial_arrays(checkpoint), plans, configuration, dataset_json)
    if len(fitted) != 1:
        raise UserError(
            f"{checkpoint} holds {', '.join(fitted) or 'no templates'}.",
            "Name a checkpoint of BrainMVPPretrainer or of a fine-tuning from it, or fill --with mean.",
        )
    return next(iter(fitted.values()))


def mean_images(
    folder: Path, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> SpatialArray:
    """The mean of each channel over the preprocessed cases that have it, centre on centre.

    Args:
        folder: of the preprocessed dataset.
        plans: the plan.
        configuration: of the plan.
        dataset_json: of the dataset.

    Raises:
        UserError: the cases of this configuration are not there.
    """
    cases_folder = folder / resolve_configuration(plans, configuration)["data_identifier"]
    if not cases_folder.is_dir():
        raise UserError(
            f"There are no preprocessed cases in {cases_folder}.",
            f"nnUNetv2_preprocess -d {folder.name} -plans_name {plans['plans_name']} -c {configuration}",
        )
    here = describe_input(plans, configuration, dataset_json)
    dataset = infer_dataset_class(str(cases_folder))(str(cases_folder))
    cases = dataset.identifiers
    present = available_channels(raw_folder(folder.name), cases, len(here["channels"]))
    size = np.max([dataset.load_case(case)[0].shape[1:] for case in cases], 0)
    total = np.zeros((len(here["channels"]), *size))
    number = np.zeros_like(total, dtype=np.int32)
    for case in tqdm(cases, desc="mean images", unit="case"):
        image = np.asarray(dataset.load_case(case)[0][:])
        first = centre_offset(size, image.shape[1:])
        box = tuple(slice(a, a + n) for a, n in zip(first, image.shape[1:], strict=True))
        for channel in np.flatnonzero(present[case]):
            total[channel][box] += image[channel]
            number[channel][box] += 1
    seen = [bool(channel.any()) for channel in number]
    spacing = here["spacing_mm"]
    return SpatialArray(
        torch.from_numpy((total / np.maximum(number, 1))[seen].astype(np.float32)),
        tuple(name for name, known in zip(here["channels"], seen, strict=True) if known),
        (*map(float, plans["original_median_spacing_after_transp"][: 3 - len(spacing)]), *spacing),
        grid_axes(plans),
        ("",) * sum(seen),
    )
