"""Damaged and hostile files: no crash, no hang, no write outside, little memory, and each is named."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hostile_files import write_hostile_pictures, write_hostile_scans
from PIL import Image

from nnssl_plugin.intake.unlabelled import prepare_dataset

MOST_MEMORY_KIB, MOST_SECONDS = 2 * 1024**2, 300


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "elsewhere" / "secret.raw"
    path.parent.mkdir()
    path.write_bytes(bytes(range(250)) * 8)
    return path


def below(folder):
    """Everything below a folder with its size."""
    return {path: path.lstat().st_size for path in folder.rglob("*")}


@pytest.mark.slow
def test_hostile_scans_are_refused_and_named(raw, source, save, secret):
    good = save("good.nii.gz", seed=1)
    hostile = write_hostile_scans(source, 140, secret=secret)
    before = below(source), below(secret.parent)
    summary = prepare_dataset(source, 501, "Hostile", processes=1)
    assert summary.added == ("good",)
    assert {row.source for row in summary.rejected} == {str(path) for path in hostile}
    assert all(row.reason and "\n" not in row.reason.strip() for row in summary.rejected)
    assert (below(source), below(secret.parent)) == before and good.is_file()
    again = prepare_dataset(source, 501, "Hostile", processes=1)
    assert {row.source for row in again.rejected} == {str(path) for path in hostile}


def test_hostile_pictures_are_refused_and_named(raw, source):
    hostile = write_hostile_pictures(source)
    pixels = np.random.default_rng(2).integers(0, 255, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(source / "good.png")
    summary = prepare_dataset(source, 501, "Hostile", processes=1)
    assert summary.added == ("good",)
    assert {row.source for row in summary.rejected} == {str(path) for path in hostile}


@pytest.mark.nightly
def test_three_hundred_hostile_files_take_little_memory_and_time(raw, tmp_path, source, save, secret):
    save("good.nii.gz", seed=1)
    hostile = write_hostile_scans(source, 300, secret=secret)
    before = below(source), below(secret.parent), set(os.listdir(tmp_path))
    words = ["-m", "nnssl_plugin.cli.main", "prepare", "-i", str(source), "-d", "501", "-n", "Hostile", "-np", "2"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=MOST_SECONDS)
    assert done.returncode == 1, done.stderr
    assert "1 cases added" in done.stdout and f"{len(hostile)} rejected" in done.stdout
    assert (below(source), below(secret.parent), set(os.listdir(tmp_path))) == before
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MOST_MEMORY_KIB
