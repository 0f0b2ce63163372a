"""A SwinUNETR small enough for tests: 12 features, one shifted window, on patches of 64 x 32 x 32 voxels."""

from copy import deepcopy

ARGUMENTS = {"feature_size": 12, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3, "use_v2": True}
PATCH = [64, 32, 32]


def with_swin(plan: dict, configuration: str = "3d_fullres", **arch_kwargs) -> dict:
    """A copy of a plan whose network is the small SwinUNETR."""
    plan = deepcopy(plan)
    plan["configurations"][configuration]["patch_size"] = PATCH
    plan["configurations"][configuration]["architecture"] = {
        "network_class_name": "nnssl_plugin.networks.swin_unetr.SwinUNETR",
        "arch_kwargs": deepcopy(ARGUMENTS) | arch_kwargs,
        "_kw_requires_import": [],
    }
    return plan
