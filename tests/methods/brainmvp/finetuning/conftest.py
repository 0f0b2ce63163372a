"""A preprocessed dataset of several modalities, adapted from a checkpoint that carries templates."""

from functools import partial

import pytest
from templated_dataset import write_adapted


@pytest.fixture
def adapted(nnunet_environment, monkeypatch, tmp_path):
    """``write_adapted`` with a file to adapt from, on empty folders of nnU-Net."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return partial(write_adapted, tmp_path / "source.pth")
