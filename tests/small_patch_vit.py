"""A PatchViT that a test can train, bare and in a plan."""

import copy

import torch

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.patch_vit import PatchViT

ARGUMENTS = {
    "patch_size": [2, 4, 4],
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "summary_token": True,
    "decoder_width": 4,
}


def small_patch_vit(channels=1, **arguments):
    """A backbone around such a network."""
    torch.manual_seed(0)
    return Backbone(PatchViT(channels, 3, **ARGUMENTS | arguments), channels)


def with_patch_vit(plan, configuration="3d_fullres", **arguments):
    """A copy of a plan with the network in one configuration; of a flat one with flat patches."""
    plan = copy.deepcopy(plan)
    planned = plan["configurations"][configuration]
    patch = ARGUMENTS["patch_size"][-len(planned["patch_size"]) :]
    planned["architecture"] = {
        "network_class_name": "nnssl_plugin.networks.patch_vit.PatchViT",
        "arch_kwargs": ARGUMENTS | {"patch_size": patch} | arguments,
        "_kw_requires_import": [],
    }
    return plan
