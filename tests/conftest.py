"""What every test may use: nnU-Net's folders in a temporary place, and the real images where they are at hand."""

import os
import tempfile
from pathlib import Path

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
