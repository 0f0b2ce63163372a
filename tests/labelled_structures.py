"""The fake dataset with its cubes as a structure, for readouts of encoders."""

import os
from pathlib import Path

import numpy as np
import torch
from fake_dataset import NAME, write_fake_dataset
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl_plugin.features.voxels import LabelledVoxels
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

CASES = [f"case_{number:02d}" for number in range(6)]
FOLD = {"train": CASES[:4], "val": CASES[4:]}


def write_labelled(*, change=lambda plan: plan, labels=("cube",), **options):
    """The fake dataset with its cubes as a structure, and one fold; its folder, plan and configuration."""
    plan = change(write_fake_dataset(**options))
    folder = Path(os.environ["nnUNet_preprocessed"]) / NAME
    write_json(folder / "nnUNetPlans.json", plan)
    described = read_json(folder / "dataset.json")
    described["labels"] = {"background": 0} | {name: value for value, name in enumerate(labels, 1)}
    write_json(folder / "dataset.json", described)
    write_json(folder / "splits_final.json", [FOLD])
    return folder, plan, next(iter(plan["configurations"]))


def opened(folder, plan, configuration):
    """The cases, and a backbone of the plan."""
    described = read_json(folder / "dataset.json")
    torch.manual_seed(0)
    network = build_network(plan, configuration, described)
    backbone = Backbone(network, len(described["channel_names"])).eval()
    return LabelledVoxels(folder, plan, configuration, described, CASES), backbone


def rewrite(folder, case, change):
    """Put another image in the place of a case's: ``change`` of image and labels."""
    path = folder / "fake_data" / case
    data, segmentation, _, properties = nnUNetDatasetBlosc2(str(path.parent), [case]).load_case(case)
    image, labels = np.array(data[:]), np.array(segmentation[:])
    for file in path.parent.glob(f"{case}*"):
        file.unlink()
    blocks = {"chunks": image.shape, "blocks": image.shape}
    nnUNetDatasetBlosc2.save_case(change(image, labels).astype(np.float32), labels, properties, str(path), **blocks)
