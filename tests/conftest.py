"""What every test may use: nnU-Net's folders in a temporary place, and the real images where they are at hand."""

import os
import signal
import socket
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnssl_plugin.cli.env import VARIABLE, search_path

REPOSITORY = Path(__file__).resolve().parent.parent
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

# Set before anything reads them, and never inherited: a test must not touch a user's own folders.
_session_folder = tempfile.TemporaryDirectory(prefix="nnssl_plugin_tests_")
os.environ.update({name: str(Path(_session_folder.name, name)) for name in NNUNET_FOLDERS})
os.environ.pop(VARIABLE, None)
os.environ.update({VARIABLE: search_path(), "nnUNet_compile": "f", "nnUNet_def_n_proc": "2"})
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in NNUNET_FOLDERS:
    Path(os.environ[_name]).mkdir()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly, minutes each")


def pytest_xdist_auto_num_workers(config):
    """Two to four processes for the whole suite; none where files or tests are named, for which imports would be paid
    twice."""
    return 0 if config.option.file_or_dir else min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(config, items):
    """Leave nightly tests out, and start the files that take longest first: a process runs whole files."""
    if not config.option.nightly:
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name != "end_to_end", item.path not in slow))


@pytest.fixture(autouse=True)
def own_signals():
    """Signals as they were: processes forked while a trainer catches SIGTERM could not be terminated."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds setup.cfg."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images, from NNSSL_PLUGIN_TEST_DATA (default: ../shared/data beside the repository)."""
    folder = Path(os.environ.get("NNSSL_PLUGIN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real images: NNSSL_PLUGIN_TEST_DATA does not name a folder, and ../shared/data is absent")
    return folder


@pytest.fixture
def nnunet_environment(tmp_path, monkeypatch) -> dict[str, str]:
    """nnU-Net's folders, empty, below ``tmp_path``: set in this process, and returned for subprocesses."""
    for name in NNUNET_FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return dict(os.environ)


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
