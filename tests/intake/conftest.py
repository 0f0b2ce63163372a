import socket
from pathlib import Path

import nibabel
import numpy as np
import pytest


@pytest.fixture
def raw(nnunet_environment):
    """The folder nnUNet_raw, empty."""
    return Path(nnunet_environment["nnUNet_raw"])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    return folder


@pytest.fixture
def phantom():
    """A function (seed, shape) → float32 volume: a bright ball with a hole in dark noise."""

    def make(seed=0, shape=(20, 18, 16)):
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
        radius = np.linalg.norm(grid, axis=0)
        ball = (radius < 0.8) & (radius > 0.25)
        return (100.0 * ball + rng.uniform(0, 10, size=shape)).astype(np.float32)

    return make


@pytest.fixture
def save(source, phantom):
    """A function (relative path, array, affine) that writes a NIfTI file below ``source``."""

    def write(relative, array=None, affine=None, seed=0):
        path = source / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(phantom(seed) if array is None else array, np.eye(4) if affine is None else affine)
        nibabel.save(image, path)
        return path

    return write


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
