"""A preprocessed dataset of several modalities, adapted from a checkpoint that carries templates."""

import os
from pathlib import Path

import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset

from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray, as_state
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

NAMES = ("T1", "T2", "FLAIR", "PD")
ONE_CHANNEL = {"channel_names": {"0": "any"}, "labels": {"background": 0, "body": 1}}
SHORT = {"epochs": 2, "iterations_per_epoch": 2, "validation_iterations": 1, "warmup_epochs": 0, "seed": 7}


def templates(names=NAMES, grid=(16, 22, 17)):
    values = torch.randn(len(names), *grid, generator=torch.Generator().manual_seed(5))
    return SpatialArray(values, tuple(names), (1.0,) * 3, ("IS", "PA", "LR"), ("ZScoreNormalization",) * len(names))


def write_channels(channels: int) -> None:
    """Give the channels of the fake dataset names of their own."""
    path = Path(os.environ["nnUNet_preprocessed"], NAME, "dataset.json")
    names = {str(number): name for number, name in enumerate(NAMES[:channels])}
    write_json(path, read_json(path) | {"channel_names": names})


def write_adapted(file: Path, channels: int = 4, *, present=None, array=None, carried: bool = True, **dataset) -> Path:
    """Write the dataset and the plan nnUNetPlans-toy of the checkpoint ``file``; return the dataset's folder.

    Args:
        file: written too: a network of one channel, and its templates.
        channels: of the dataset.
        present: case → channels that it has, for ``modalities.json``.
        array: templates of the checkpoint.
        carried: whether it has any.
        dataset: arguments of ``write_fake_dataset``.
    """
    plan = write_fake_dataset(cases=6, channels=channels, **dataset)
    write_channels(channels)
    configuration = next(iter(plan["configurations"]))
    own = fake_plan(dimensions=dataset.get("dimensions", 3), residual=dataset.get("residual", False))
    torch.manual_seed(1)
    content = {
        "network_weights": build_network(own, configuration, ONE_CHANNEL).state_dict(),
        "provenance": {"trained": ["encoder.", "decoder.encoder."], "network": describe_network(own, configuration)},
    }
    save_checkpoint(content | (as_state({"templates": array or templates()}) if carried else {}), file)
    adapt_checkpoint("901", name="toy", weights=file, configuration=configuration)
    if present is not None:
        write_json(Path(os.environ["nnUNet_raw"], NAME, "modalities.json"), present)
    return Path(os.environ["nnUNet_preprocessed"], NAME)
