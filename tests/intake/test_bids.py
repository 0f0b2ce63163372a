"""BIDS: subjects, sessions, suffixes, derivatives, participants.tsv."""

import csv
import json

import pytest

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.bids import bids_patterns


@pytest.fixture
def bids(source, save):
    """Three subjects, one with two sessions; T1w and FLAIR; derivatives and a series over time."""
    (source / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    save("sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", seed=1)
    save("sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz", seed=2)
    save("sub-02/anat/sub-02_T1w.nii.gz", seed=3)
    save("sub-02/anat/sub-02_acq-3d_FLAIR.nii.gz", seed=4)
    save("sub-03/anat/sub-03_T1w.nii.gz", seed=5)
    save("sub-02/func/sub-02_task-rest_bold.nii.gz", seed=6)
    save("sub-02/anat/sub-02_defacemask.nii.gz", seed=7)
    save("derivatives/p/sub-01/anat/sub-01_space-MNI_T1w.nii.gz", seed=8)
    (source / "participants.tsv").write_text(
        "participant_id\tage\tgroup\nsub-01\t40\tpatient\nsub-02\t50\tcontrol\nsub-03\tn/a\tpatient\nsub-09\t1\tcontrol\n"
    )
    return source


def prepare(*words):
    return main(["prepare", *map(str, words), "-np", "1"])


def images(raw):
    return sorted(path.name for path in (raw / "Dataset501_X" / "imagesTr").iterdir())


def test_anatomical_scans_of_subjects_are_taken_and_nothing_else(bids, raw):
    assert prepare("-i", bids, "-d", 501, "-n", "X") == 0
    names = images(raw)
    assert len(names) == 5 and sum("FLAIR" in name for name in names) == 1
    assert not any(word in name for name in names for word in ("bold", "MNI", "defacemask"))


def test_suffixes_choose_and_sessions_share_their_subject(bids, raw):
    assert prepare("-i", bids, "-d", 501, "-n", "X", "--suffix", "T1w") == 0
    assert len(images(raw)) == 4 and all("T1w" in name for name in images(raw))
    with (raw / "Dataset501_X" / "subjects.csv").open() as stream:
        subjects = {row["case"]: row["subject"] for row in csv.DictReader(stream)}
    assert sorted(subjects.values()) == ["sub-01", "sub-01", "sub-02", "sub-03"]


def test_participants_are_class_labels(bids, raw):
    words = ("--suffix", "T1w", "--class-labels", bids / "participants.tsv", "--target", "group")
    assert prepare("-i", bids, "-d", 501, "-n", "X", *words) == 0
    with (raw / "Dataset501_X" / "classification.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["subject"], row["group"]) for row in sorted(rows, key=lambda row: row["case"])] == [
        ("sub-01", "patient"), ("sub-01", "patient"), ("sub-02", "control"), ("sub-03", "patient")
    ]  # fmt: skip


def test_a_suffix_that_does_not_occur_names_those_that_do(bids):
    with pytest.raises(UserError, match="suffix T2w") as caught:
        bids_patterns(bids, ["T2w"])
    assert "FLAIR, T1w, bold" in caught.value.remedy


def test_a_folder_that_is_not_bids_takes_no_suffix(source, save):
    save("a.nii.gz")
    with pytest.raises(UserError, match="no BIDS dataset"):
        bids_patterns(source, ["T1w"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("id\tgroup\nsub-01\ta\n", "participant_id"), ("participant_id\tgroup\nsub-77\ta\n", "names nobody")],
)
def test_a_table_that_does_not_fit_is_refused(content, message, bids, raw, capsys):
    (bids / "participants.tsv").write_text(content)
    assert prepare("-i", bids, "-d", 501, "-n", "X", "--class-labels", bids / "participants.tsv") == 2
    assert message in capsys.readouterr().err


def test_suffixes_become_channels_of_a_session(bids, raw):
    words = ("--modalities", "T1w=*_T1w*", "FLAIR=*_FLAIR*", "--cases-by", "folder")
    assert prepare("-i", bids, "-d", 501, "-n", "X", *words) == 0
    present = json.loads((raw / "Dataset501_X" / "modalities.json").read_text())
    assert sorted(present.values()) == [[0], [0], [0], [0, 1]]
    with (raw / "Dataset501_X" / "subjects.csv").open() as stream:
        subjects = {row["case"]: row["subject"] for row in csv.DictReader(stream)}
    assert sorted(subjects.values()) == ["sub-01", "sub-01", "sub-02", "sub-03"] and set(subjects) == set(present)
