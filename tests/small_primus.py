"""A Primus small enough for tests: two blocks of width 24 on patches of 4 voxels."""

from copy import deepcopy

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
    "arch_kwargs": {
        "embed_dim": 24,
        "patch_embed_size": [4, 4, 4],
        "eva_depth": 2,
        "eva_numheads": 2,
        "input_shape": [16, 16, 16],
        "drop_path_rate": 0.2,
        "init_values": 0.1,
        "scale_attn_inner": True,
    },
    "_kw_requires_import": [],
}


def with_primus(plan: dict, configuration: str = "3d_fullres", **arch_kwargs) -> dict:
    """A copy of a plan whose network is the small Primus, for patches of 16 voxels."""
    plan = deepcopy(plan)
    plan["configurations"][configuration]["architecture"] = deepcopy(ARCHITECTURE)
    plan["configurations"][configuration]["architecture"]["arch_kwargs"] |= arch_kwargs
    return plan
