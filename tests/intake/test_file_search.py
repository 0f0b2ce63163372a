"""Scans are found through links, without loops; patterns choose; DICOM is recognised; odd files are not opened."""

import os

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.file_search import find_scans, is_dicom, matches


def touch(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


DICOM = bytes(128) + b"DICM" + bytes(20)


def names(found, source):
    return [scan.relative_to(source).as_posix() for scan in found.scans]


def test_links_to_folders_are_followed_once_and_loops_end(source, tmp_path):
    touch(source / "real" / "a.nii.gz")
    touch(tmp_path / "store" / "b.nii.gz")
    for name in ("link1", "link2"):
        (source / name).symlink_to(tmp_path / "store")
    (source / "real" / "up").symlink_to(source)
    (tmp_path / "store" / "back").symlink_to(source / "real")
    (source / "above").symlink_to(tmp_path)
    (source / "gone").symlink_to(tmp_path / "nowhere")
    (source / "again").symlink_to(source / "real")
    found = find_scans(source)
    assert names(found, source) == ["link1/b.nii.gz", "real/a.nii.gz"]
    assert found.loops == (source / "above",)


def test_patterns_choose_by_path_or_name(source):
    for name in ("siteA/t1.nii.gz", "siteA/t2.nii.gz", "siteB/deep/t1.nrrd", "siteB/t2.nii"):
        touch(source / name)
    found = find_scans(source, include=["t1*", "siteB/*"], exclude=["*/deep/*"])
    assert names(found, source) == ["siteA/t1.nii.gz", "siteB/t2.nii"] and found.excluded == 2
    with pytest.raises(UserError, match="patterns leave none of the 4 scans") as caught:
        find_scans(source, include=["T1*"])
    assert "siteA/t1.nii.gz" in caught.value.remedy
    assert not matches("a/b.nii", ["a"]) and matches("a/b.nii", ["x", "a/*"])


def test_dicom_is_recognised_by_its_content(source, tmp_path):
    touch(source / "series" / "1.2.840.1", DICOM)
    touch(source / "IM0001.dcm", DICOM)
    touch(source / "notes.txt", b"DICM")
    with pytest.raises(UserError, match="holds 2 DICOM files") as caught:
        find_scans(source)
    assert "dcm2niix" in caught.value.remedy
    touch(source / "a.nii.gz")
    found = find_scans(source)
    assert (found.others, found.dicom) == (3, 2)
    os.mkfifo(tmp_path / "pipe")
    assert not is_dicom(tmp_path / "pipe") and not is_dicom(tmp_path / "nowhere") and not is_dicom(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens every folder")
def test_a_closed_folder_is_told(source):
    touch(source / "a.nii.gz")
    (source / "closed").mkdir(mode=0)
    assert "closed: Permission denied" in find_scans(source).closed[0]
