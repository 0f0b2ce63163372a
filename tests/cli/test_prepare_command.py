"""The verb prepare: exit codes and what it prints."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnssl_plugin.cli.main import main


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    array = np.random.default_rng(0).uniform(size=(8, 9, 10)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "a.nii.gz")
    return folder


def command(scans, *more):
    return main(["prepare", "-i", str(scans), "-d", "77", "-n", "Cli", "-np", "1", *more])


def test_exit_code_is_zero_where_all_was_taken(nnunet_environment, scans, capsys):
    assert command(scans) == 0
    assert "1 cases added, 0 known" in capsys.readouterr().out


def test_exit_code_is_one_and_the_table_is_named_where_something_was_rejected(nnunet_environment, scans, capsys):
    for number in range(7):
        (scans / f"bad{number}.nii.gz").touch()
    assert command(scans) == 1
    printed = capsys.readouterr().out
    table = Path(nnunet_environment["nnUNet_raw"]) / "Dataset077_Cli" / "rejected.csv"
    assert f"7 rejected, see {table}" in printed and "7 x empty file, for example " in printed and "bad0" in printed
    assert "size     8 x 9 x 10 voxels" in printed and "contact_sheet.png" in printed
    assert len(printed.splitlines()) <= 11
    assert command(scans) == 1  # still rejected


@pytest.mark.slow
def test_what_is_set_aside_is_counted_kept_or_left_out(nnunet_environment, scans, capsys):
    array = np.random.default_rng(1).uniform(size=(8, 9, 10)).astype(np.float32)
    for number in range(3):
        nibabel.save(nibabel.Nifti1Image(array + number, np.eye(4)), scans / f"{number}_mask.nii.gz")
    assert command(scans) == 1
    printed = capsys.readouterr().out
    assert "3 set aside" in printed and "3 x named as a segmentation, for example" in printed and "--keep" in printed
    assert command(scans, "--exclude", "[12]_mask*", "--keep", "0_*") == 0
    printed = capsys.readouterr().out
    assert "1 cases added, 1 known" in printed and "2 scans are left out" in printed
    assert command(scans, "--keep") == 0
    assert "2 cases added, 2 known" in capsys.readouterr().out


def test_exit_code_is_two_for_a_mistake(nnunet_environment, scans, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert command(scans) == 2
    assert "nnUNet_raw is not set" in capsys.readouterr().err


def test_lost_source_is_named(nnunet_environment, scans, capsys):
    command(scans)
    (scans / "a.nii.gz").rename(scans.parent / "elsewhere.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.arange(60.0).reshape(3, 4, 5), np.eye(4)), scans / "b.nii.gz")
    assert command(scans) == 0
    assert "source of case a is gone" in capsys.readouterr().out


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", "--help"])
    assert "nnssl_plugin prepare -i" in capsys.readouterr().out
