"""The scripts that lay out public classification data: what they write, on small stand-ins."""

import runpy
import sys

import nibabel
import numpy as np
import pytest

from nnssl_plugin.data.images import find_images
from nnssl_plugin.nnunet.case_labels import read_table


@pytest.fixture
def run(repository, monkeypatch, capsys):
    """A function (script, arguments) → what the script printed."""

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(repository / "benchmarks" / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_official_splits_of_adrenalmnist_stay_apart(run, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": 255 * rng.integers(0, 2, (3, 6, 7, 8), dtype=np.uint8),
        "train_labels": [[0], [1], [0]],
        "val_images": 255 * rng.integers(0, 2, (2, 6, 7, 8), dtype=np.uint8),
        "val_labels": [[1], [0]],
    }
    np.savez(tmp_path / "a.npz", **arrays)
    assert run("adrenal_data.py", "-i", tmp_path / "a.npz", "-o", tmp_path / "out").startswith("3 train, 2")
    for official, name, channel in (("train", "train", ""), ("val", "test", "_0000")):
        rows = read_table(tmp_path / "out" / f"{name}.csv")
        assert [row["diagnosis"] == "hyperplasia" for row in rows] == np.ravel(arrays[f"{official}_labels"]).tolist()
        for row, volume in zip(rows, arrays[f"{official}_images"], strict=True):
            image = nibabel.load(tmp_path / "out" / name / f"{row['case']}{channel}.nii.gz")
            np.testing.assert_array_equal(np.asarray(image.dataobj), volume // 255)
    cases, left_out = find_images(tmp_path / "out" / "test", ".nii.gz")  # as classify reads them
    assert list(cases) == [row["case"] for row in read_table(tmp_path / "out" / "test.csv")] and not left_out


def test_tables_name_the_images_that_are_there(run, tmp_path):
    for path in ("us/benign/b (1).png", "sts/P1/CT_image.nii.gz", "sts/P1/CT_mask.nii.gz", "sts/P2/PET_image.nii.gz"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    captions = 'image_path,text_caption,label\nbenign/b (1).png,"A, b",benign\nbenign/gone.png,x,benign\n'
    (tmp_path / "us" / "captions.csv").write_text(captions)
    run("busi_data.py", "-i", tmp_path / "us", "-o", tmp_path / "us.csv")
    assert read_table(tmp_path / "us.csv") == [{"case": "benign/b (1).png", "diagnosis": "benign"}]
    run("sts_modality_data.py", "-i", tmp_path / "sts", "-o", tmp_path / "sts.csv")
    assert read_table(tmp_path / "sts.csv") == [
        {"case": "P1/CT_image.nii.gz", "subject": "P1", "modality": "CT"},
        {"case": "P2/PET_image.nii.gz", "subject": "P2", "modality": "PET"},
    ]
