import os
import socket
from pathlib import Path

import nibabel
import numpy as np
import pytest

DATA = Path(os.environ.get("NNSSL_PLUGIN_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path / "nnUNet_raw"


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


@pytest.fixture
def real_data():
    """A function (relative path) → path in the shared data, or a skip."""

    def find(relative):
        if not (DATA / relative).exists():
            pytest.skip(f"no {relative} below {DATA} (set NNSSL_PLUGIN_TEST_DATA)")
        return (DATA / relative).resolve()

    return find
