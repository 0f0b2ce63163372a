"""A planned U-Net small enough for tests: 4 features in its first stage, twice as many in each that follows."""

from pathlib import Path

from nnssl_plugin.io.files import read_json


def narrow(plan: Path, configuration: str = "3d_fullres") -> str:
    """What ``nnssl_plugin plan --set`` takes to make the U-Net of a plan narrow, with as many stages as it has."""
    network = read_json(plan)["configurations"][configuration]["architecture"]["arch_kwargs"]
    features = [4 * 2**stage for stage in range(len(network["features_per_stage"]))]
    return f"configurations.{configuration}.architecture.arch_kwargs.features_per_stage={features}"
