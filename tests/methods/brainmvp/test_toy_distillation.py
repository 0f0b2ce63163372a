"""What a template learns, on data of which its optimum is known."""

from dataclasses import replace

import pytest
import torch
from fake_dataset import fake_plan

from nnssl_plugin.methods.brainmvp.objective import BrainMVP
from nnssl_plugin.methods.brainmvp.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.pretraining.optimisation import optimisation_of
from nnssl_plugin.pretraining.update import update

MODALITIES, GRID, WINDOW, STEPS, BATCH = ("T1", "T2", "FLAIR"), 20, 16, 240, 3


def two_stages() -> Backbone:
    """A network whose bottleneck lets every voxel through, at half the resolution."""
    plan = fake_plan()
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "n_stages": 2,
        "features_per_stage": [8, 16],
        "kernel_sizes": [[3] * 3] * 2,
        "strides": [[1] * 3, [2] * 3],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
    }
    one_channel = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}
    return Backbone(build_network(plan, "3d_fullres", one_channel), 1)


def windows_of(volumes, generator):
    """Cases that differ from the volume of each modality by noise alone, seen in windows of random places."""
    origin = torch.randint(0, GRID - WINDOW + 1, (BATCH, 3), generator=generator)
    cut = [volumes[:, z : z + WINDOW, y : y + WINDOW, x : x + WINDOW] for z, y, x in origin.tolist()]
    image = torch.stack(cut)
    return {
        "image": image + 0.1 * torch.randn(image.shape, generator=generator),
        "available": torch.ones(BATCH, len(MODALITIES), dtype=torch.bool),
        "origin": origin.float(),
        "case_shape": torch.full((BATCH, 3), float(GRID)),
    }


@pytest.mark.slow
def test_templates_become_the_volumes_that_their_modalities_share():
    """Property 5. Voxels of the volumes are independent: but for the template, nothing tells what was replaced."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    volumes = torch.randn(len(MODALITIES), *[GRID] * 3, generator=generator)
    training = replace(TRAINING, lr=5e-3)
    task = BrainMVP(
        two_stages(), Settings(template_lr=4e-2), modalities=MODALITIES, template_size=[GRID] * 3, lr=training.lr
    )
    optimizer, schedules = optimisation_of(task, training, total=STEPS)
    for step in range(STEPS):
        schedules.step(step)
        optimizer.zero_grad()
        total = task(task.views(windows_of(volumes, generator), generator), step / STEPS)["total"]
        total.backward()
        task.after_step(step / STEPS, update(optimizer, total, scaler=None, clip=training.gradient_clip))
    correlation = torch.corrcoef(torch.cat([task.templates.detach().flatten(1), volumes.flatten(1)]))[:3, 3:]
    assert (correlation.diagonal() > 0.9).all()
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 0.2
