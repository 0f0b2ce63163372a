"""A checkpoint of an untrained network with the plan that embedding needs, made in a moment."""

import os
from pathlib import Path

import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.plans import build_network

READER = {
    "image_reader_writer": "NibabelIOWithReorient",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
}


def checkpoint_of(
    folder: Path, *, dimensions=3, channels=1, spacing=(1.0, 1.0, 1.0), network_class=None, change=None, seed=3, **more
) -> Path:
    """A checkpoint as nnU-Net writes it, of the fake dataset's network.

    Args:
        folder: where to.
        dimensions: of the network.
        channels: of the images.
        spacing: of the plan.
        network_class: that the plan names in place of its own.
        change: of the plan, before the network is built.
        seed: of the weights.
        more: entries of the checkpoint.
    """
    write_fake_dataset(cases=1, channels=channels, dimensions=dimensions)
    dataset_json = read_json(Path(os.environ["nnUNet_preprocessed"], NAME, "dataset.json"))
    plans = fake_plan(dimensions=dimensions) | READER
    name = next(iter(plans["configurations"]))
    plans["configurations"][name] |= {
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    }
    plans["foreground_intensity_properties_per_channel"] = {str(c): {} for c in range(channels)}
    plans = change(plans) if change else plans
    torch.manual_seed(seed)
    network = build_network(plans, name, dataset_json)
    if network_class:
        plans["configurations"][name]["architecture"]["network_class_name"] = network_class
    arguments = {"plans": plans, "configuration": name, "fold": 0, "dataset_json": dataset_json}
    path = folder / "checkpoint_final.pth"
    save_checkpoint(
        {"network_weights": network.state_dict(), "init_args": arguments, "trainer_name": "nnUNetTrainer", **more}, path
    )
    return path
