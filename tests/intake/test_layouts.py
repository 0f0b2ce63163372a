"""Folders as nnU-Net and the Decathlon have them are understood as they are."""

import json

import nibabel
import numpy as np
import pytest

import nnssl_plugin as nnssl
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.grouping import Modalities
from nnssl_plugin.intake.unlabelled import ALL, prepare_dataset

LABELLED = Modalities(labels=ALL)


def prepare(source, name="Cases", dataset_id=501, **options):
    return prepare_dataset(source, dataset_id, name, **{"processes": 1, **options})


def content(folder, name="dataset.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture
def nnunet(source, save, phantom):
    """Two training cases (the second without its second channel), one test case, and a file without a channel."""
    for case, channels in (("a", (0, 1)), ("b", (0,))):
        for channel in channels:
            save(f"imagesTr/{case}_{channel:04d}.nii.gz", seed=ord(case) + channel)
        save(f"labelsTr/{case}.nii.gz", (phantom(ord(case)) > 50).astype(np.uint8))
    save("imagesTs/a_0000.nii.gz", seed=7)
    save("imagesTr/odd.nii.gz", seed=8)
    names = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (source / "dataset.json").write_text(json.dumps(names))
    return source


def test_channels_of_nnunet_become_cases_with_body_masks(raw, nnunet):
    summary = prepare(nnunet)
    assert summary.added == ("a", "b", "imagesTs_a") and summary.unnamed == 2  # labelsTr
    assert content(summary.folder, "modalities.json") == {"a": [0, 1], "b": [0], "imagesTs_a": [0]}
    assert content(summary.folder)["labels"] == {"background": 0, "body": 1}
    assert [row.reason for row in summary.rejected] == [
        "its name says no channel of dataset.json: it ends in none of _0000 to _0001"
    ]
    with pytest.raises(UserError, match="--modality MR for 2 channels"):
        prepare(nnunet, modality="MR")


def test_labels_are_taken_over_with_their_names_where_they_are_asked_for(raw, nnunet, phantom):
    summary = prepare(nnunet, modalities=LABELLED)
    assert summary.added == ("a", "b") and content(summary.folder)["labels"] == {"background": 0, "ball": 1}
    stored = nibabel.load(summary.folder / "labelsTr" / "b.nii.gz").get_fdata()
    np.testing.assert_array_equal(stored, phantom(ord("b")) > 50)
    (nnunet / "labelsTr" / "b.nii.gz").unlink()
    again = prepare(nnunet, "Fewer", 502, modalities=LABELLED)
    assert again.added == ("a",) and "no segmentation" in again.rejected[0].reason
    by_function = nnssl.prepare(nnunet, 503, "Function", labels=[], processes=1)
    assert by_function.added == ("a",) and content(by_function.folder)["labels"] == {"background": 0, "ball": 1}


def test_files_with_four_dimensions_of_the_decathlon_become_channels(raw, source, save, phantom, capsys):
    volumes = [np.stack([phantom(seed), phantom(seed + 1)], axis=-1) for seed in (1, 3)]
    for number, volume in enumerate(volumes):
        save(f"imagesTr/BRATS_{number:03d}.nii.gz", volume)
        save(f"labelsTr/BRATS_{number:03d}.nii.gz", (phantom(number) > 50).astype(np.uint8) * 2)
    save("imagesTr/BRATS_002.nii.gz", np.ones((8, 8, 8, 3)))
    save("imagesTs/BRATS_003.nii.gz", volumes[0] + 1)
    names = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema", "2": "tumour"}}
    (source / "dataset.json").write_text(json.dumps(names))
    summary = prepare(source)
    assert summary.added == ("BRATS_000", "BRATS_001", "imagesTs_BRATS_003")
    assert "2 volumes in one file are needed" in summary.rejected[0].reason and summary.absent == ()
    assert content(summary.folder)["channel_names"] == {"0": "FLAIR", "1": "T1w"}
    for channel in (0, 1):
        image = nibabel.load(summary.folder / "imagesTr" / f"BRATS_001_{channel:04d}.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), volumes[1][..., channel])
    assert (prepare(source).known, prepare(source).added) == (3, ())
    command = ["prepare", "-i", str(source), "-d", "502", "-n", "Labelled", "-np", "1", "--labels"]
    assert main(command) == 1
    assert "2 cases added" in capsys.readouterr().out
    names = content(raw / "Dataset502_Labelled")["labels"]
    assert names == {"background": 0, "edema": 1, "tumour": 2}


def test_one_channel_is_of_the_modality_that_its_name_says(raw, source, save, phantom):
    save("imagesTr/a.nii.gz", phantom(1) * 10 - 1000)
    (source / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}}))
    summary = prepare(source)
    assert summary.added == ("a",) and content(summary.folder)["channel_names"] == {"0": "CT"}
    assert not (summary.folder / "modalities.json").exists()
    assert prepare(source, "Mr", 502, modality="MR", keep=ALL).added == ("a",)


def test_a_folder_without_a_layout_has_no_labels_of_its_own(raw, source, save):
    save("imagesTr/a.nii.gz")
    with pytest.raises(UserError, match="no imagesTr beside a dataset"):
        prepare(source, modalities=LABELLED)
    (source / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="names no channels"):
        prepare(source)
