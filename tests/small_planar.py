"""The 2D networks with torchvision's and timm's encoders, small enough for tests on patches of 32 and 16 pixels."""

from copy import deepcopy

NETWORKS = {
    "ResNetUNet": (
        "nnssl_plugin.networks.resnet_unet.ResNetUNet",
        {"blocks": [1, 1, 1, 1], "width_per_group": 4, "decoder_features": [8, 8, 8, 4, 4]},
    ),
    "SAMUNet": (
        "nnssl_plugin.networks.sam_unet.SAMUNet",
        {
            "img_size": 64,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "window_size": 2,
            "global_attn_indexes": [2],
            "decoder_width": 4,
        },
    ),
}
"""Name of the class → its dotted name and arguments."""


def with_planar(plan: dict, name: str, configuration: str = "2d", patch=(64, 64), **arch_kwargs) -> dict:
    """A copy of a plan whose 2D network is the small one of that name."""
    plan = deepcopy(plan)
    path, arguments = NETWORKS[name]
    plan["configurations"][configuration]["architecture"] = {
        "network_class_name": path,
        "arch_kwargs": deepcopy(arguments) | arch_kwargs,
        "_kw_requires_import": [],
    }
    plan["configurations"][configuration]["patch_size"] = list(patch)
    return plan
