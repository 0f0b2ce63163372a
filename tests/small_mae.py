"""Small networks of every kind and windows for them, for tests of MAE's tasks in float64."""

import torch
from fake_dataset import fake_plan
from small_primus import with_primus

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

SIZES = {"unet": (16, 20, 12), "2d": (16, 20), "primus": (16, 16, 16)}
"""Kind of network → size of its windows in voxels."""
KINDS = list(SIZES)


def small_backbone(kind="unet", channels=1) -> Backbone:
    """The same network each time."""
    torch.manual_seed(0)
    plan = fake_plan(dimensions=2 if kind == "2d" else 3)
    plan = with_primus(plan, drop_path_rate=0.0) if kind == "primus" else plan
    labels = {
        "channel_names": {str(c): "MR" for c in range(channels)},
        "labels": {"background": 0, "body": 1},
        "file_ending": ".nii.gz",
    }
    return Backbone(build_network(plan, next(iter(plan["configurations"])), labels), channels)


def make_batch(size, samples=2, channels=1, seed=0):
    """Windows that lie in their cases, of which all channels are there."""
    image = torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "image": image,
        "available": torch.ones(samples, channels, dtype=torch.bool),
        "cases": [f"case_{number}" for number in range(samples)],
        "origin": torch.zeros(samples, len(size)),
        "case_shape": torch.tensor([size] * samples).float(),
    }


def views_of(task, batch, seed=0):
    return task.views(batch, torch.Generator().manual_seed(seed))
