"""Weights of any kind, put into the network of a plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nnssl_plugin.checkpoints.adaptation.adapt import check_coverage
from nnssl_plugin.checkpoints.adaptation.finetuning_plan import fit_source
from nnssl_plugin.checkpoints.sources.source import read_source


def load_fitted(network: nn.Module, weights: str | Path, plans: Mapping[str, Any], configuration: str) -> None:
    """Give a plan's network what a file holds for it, as fine-tuning would begin.

    Args:
        network: freshly built; its values stay where the file has none.
        weights: anything that ``read_source`` reads.
        plans: the plan of the network.
        configuration: one of its configurations.

    Raises:
        UserError: the file cannot be read, or too little of its encoder fits.
    """
    state, report = fit_source(read_source(weights), network, plans, configuration)
    check_coverage(report)
    network.load_state_dict(state)
