"""A SegResNetDS small enough for tests: four stages of 4 to 32 features, on patches of 16 voxels."""

from copy import deepcopy

ARGUMENTS = {"init_filters": 4, "blocks_down": [1, 2, 1, 1], "norm": "batch"}
CLASS = "nnssl_plugin.networks.segresnet.SegResNetDS"


def with_segresnet(plan: dict, configuration: str = "3d_fullres", **arch_kwargs) -> dict:
    """A copy of a plan whose network is the small SegResNetDS."""
    plan = deepcopy(plan)
    plan["configurations"][configuration]["architecture"] = {
        "network_class_name": CLASS,
        "arch_kwargs": deepcopy(ARGUMENTS) | arch_kwargs,
        "_kw_requires_import": [],
    }
    return plan
