"""From an export to a dataset, by the command: names, no identity, a second run, structures, and what is told."""

import builtins
import csv
import gzip
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_export import NAME, phantom, structure_set, write_series
from pydicom.uid import generate_uid

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.pixels import read_planes
from nnssl_plugin.intake.dicom.prepare import DicomChoice, prepare_dicom_dataset

IDENTITY = ("secret", "0815", "1950", "hospital", "export", "t1 post")


def prepare(*words):
    """The exit code of the verb."""
    return main(["prepare", *map(str, words), "-np", "1"])


@pytest.fixture
def two_patients(export):
    """Two patients with a T1 each, and a T2 of the first."""
    study = generate_uid()
    write_series(export / NAME / "1", phantom(seed=1), uids=(study, generate_uid()), SeriesDescription="T1 post")
    write_series(export / NAME / "2", phantom(seed=2), uids=(study, generate_uid()), SeriesDescription="T2")
    write_series(export / "other", phantom(seed=3), SeriesDescription="T1 post", PatientID="Secret-2")
    return export


def test_an_export_becomes_a_dataset_without_identity(two_patients, raw, capsys):
    assert prepare("-i", two_patients, "-d", 501, "-n", "X", "--series", "SeriesDescription~T1") == 0
    folder = raw / "Dataset501_X"
    assert len(list((folder / "imagesTr").iterdir())) == len(list((folder / "labelsTr").iterdir())) == 2
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "MR"}
    with (folder / "subjects.csv").open() as stream:
        assert len({row["subject"] for row in csv.DictReader(stream)}) == 2
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        assert not path.is_symlink()
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        shown = f"{path.relative_to(raw)} ".encode() + content.replace(str(raw).encode(), b"")
        assert not [word for word in IDENTITY if word.encode() in shown.lower()], path
    printed = capsys.readouterr().out
    assert "2 taken, 1 left out, 0 refused" in printed and "no rule of --series takes it" in printed
    local = raw / ".nnssl_plugin"
    assert NAME in (local / "Dataset501_X" / "series.csv").read_text()  # in the folders' paths, and local
    assert (local / "Dataset501_X").stat().st_mode & 0o077 == 0


def test_headers_of_images_and_masks_hold_geometry_alone(two_patients, raw):
    prepare("-i", two_patients, "-d", 501, "-n", "X")
    for path in (raw / "Dataset501_X").rglob("*.nii.gz"):
        header = nibabel.load(path).header
        assert all(bytes(header[name]).strip(b"\0") == b"" for name in ("descrip", "aux_file", "intent_name"))
        assert bytes(header["db_name"]).strip(b"\0") == b"" and not header.extensions


def test_a_second_run_converts_nothing_anew_and_adds_what_is_new(two_patients, raw, monkeypatch):
    prepare("-i", two_patients, "-d", 501, "-n", "X")
    images = raw / "Dataset501_X" / "imagesTr"
    before = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    write_series(two_patients / "new", phantom(seed=4))
    read = []

    def counted(*arguments):
        read.append(arguments)
        return read_planes(*arguments)

    monkeypatch.setattr("nnssl_plugin.intake.dicom.convert.read_planes", counted)
    prepare("-i", two_patients, "-d", 501, "-n", "X")
    after = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    assert len(read) == 1 and len(after) == 4 and before.items() <= after.items()


def test_two_exports_go_into_one_dataset(export, raw, tmp_path):
    write_series(export / "a", phantom(seed=1))
    write_series(tmp_path / "second", phantom(seed=2))
    prepare("-i", export, "-d", 501, "-n", "X")
    prepare("-i", tmp_path / "second", "-d", 501, "-n", "X")
    assert len(list((raw / "Dataset501_X" / "imagesTr").iterdir())) == 2


def test_what_other_rules_took_is_not_in_a_dataset_made_anew(two_patients, raw):
    prepare("-i", two_patients, "-d", 501, "-n", "X")
    shutil.rmtree(raw / "Dataset501_X")
    prepare("-i", two_patients, "-d", 501, "-n", "X", "--series", "SeriesDescription=T2")
    assert len(list((raw / "Dataset501_X" / "imagesTr").iterdir())) == 1


def test_one_key_gives_a_patient_one_name_in_all_datasets(two_patients, raw, tmp_path):
    key = tmp_path / "safe" / "key"
    for number in (501, 502):
        prepare("-i", two_patients, "-d", number, "-n", "X", "--key-file", key, "--local", tmp_path / "local")
    one, two = ((raw / f"Dataset{n}_X" / "subjects.csv").read_text() for n in (501, 502))
    assert one == two and not (raw / ".nnssl_plugin").exists()
    key.unlink()
    prepare("-i", two_patients, "-d", 503, "-n", "X", "--key-file", key, "--local", tmp_path / "local")
    assert (raw / "Dataset503_X" / "subjects.csv").read_text() != one


def test_structures_become_the_labels(export, raw, capsys):
    images = write_series(export / "a", phantom(seed=1), modality="CT")
    write_series(export / "b", phantom(seed=2), modality="CT")
    angles = np.linspace(0, 6, 40)
    contour = np.stack([-16 + 6 * np.cos(angles), -6 + 6 * np.sin(angles), np.full(40, 14.0)], axis=1)
    structure_set(export / "rs.dcm", images, {"GTV_1": [contour]})
    words = ("-i", export, "-d", 7, "-n", "T", "--modality", "CT", "--structures", "GTV*=1")
    assert prepare(*words) == 0
    folder = raw / "Dataset007_T"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "GTV": 1} and description["numTraining"] == 1
    (labels,) = (folder / "labelsTr").iterdir()
    assert set(np.unique(np.asarray(nibabel.load(labels).dataobj))) == {0, 1}
    assert (folder / "contact_sheet.png").is_file()
    assert prepare(*words) == 0 and "0 cases added, 1 known" in capsys.readouterr().out
    with pytest.raises(UserError, match="same --structures"):
        prepare_dicom_dataset(export, 7, "T", DicomChoice(modality="CT", structures=["GTV*=1", "X=2"]), processes=1)


def test_the_modality_of_the_series_names_the_channel(export, raw):
    write_series(export, phantom(), modality="CT")
    prepare("-i", export, "-d", 501, "-n", "X")
    assert json.loads((raw / "Dataset501_X" / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_volumes_of_other_formats_beside_dicom_are_taken_as_before(source, save, raw, capsys):
    save("a.nii.gz")
    write_series(source, phantom())
    prepare("-i", source, "-d", 501, "-n", "X")
    assert [path.name for path in (raw / "Dataset501_X" / "imagesTr").iterdir()] == ["a_0000.nii.gz"]
    assert "--series" in capsys.readouterr().out


def test_without_pydicom_the_message_says_what_to_install(export, raw, monkeypatch, capsys):
    write_series(export, phantom())
    real = builtins.__import__

    def refuse(name, *rest, **others):
        if name == "pydicom":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert prepare("-i", export, "-d", 501, "-n", "X") == 2
    assert "nnssl_plugin[dicom]" in capsys.readouterr().err


def test_an_unreadable_file_is_told_and_the_exit_code_says_so(export, raw, capsys):
    write_series(export / "good", phantom())
    Path(export, "noise.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    assert prepare("-i", export, "-d", 501, "-n", "X") == 1
    assert "unreadable" in capsys.readouterr().out


def test_patterns_choose_files_of_the_export(two_patients, raw):
    prepare("-i", two_patients, "-d", 501, "-n", "X", "--include", "other/*")
    prepare("-i", two_patients, "-d", 502, "-n", "Y", "--exclude", "other/*")
    assert len(list((raw / "Dataset501_X" / "imagesTr").iterdir())) == 1
    assert len(list((raw / "Dataset502_Y" / "imagesTr").iterdir())) == 2


@pytest.mark.parametrize("by", ["patient", "study", "folder"])
def test_a_table_of_classes_names_patients_studies_or_folders(by, export, raw, tmp_path):
    lines = ["case,grade"]
    for number in range(4):
        images = write_series(export / f"p{number}", phantom(seed=number), PatientID=f"Secret-{number}")
        key = {"patient": images[0].PatientID, "study": images[0].StudyInstanceUID, "folder": f"p{number}"}[by]
        lines.append(f"{key},{'high' if number % 2 else 'low'}")
    write_series(export / "without", phantom(seed=9), PatientID="Secret-9")
    table = tmp_path / "grades.csv"
    table.write_text("\n".join(lines))
    assert prepare("-i", export, "-d", 501, "-n", "X", "--class-labels", table) == 0
    with (raw / "Dataset501_X" / "classification.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and {row["grade"] for row in rows} == {"low", "high"}
    assert len({row["subject"] for row in rows}) == 4 and "Secret" not in str(rows)


def test_a_row_that_names_no_series_is_told(export, raw, tmp_path, capsys):
    write_series(export, phantom())
    (tmp_path / "t.csv").write_text("case,grade\nnobody,low\nSecret-0815,high\n")
    assert prepare("-i", export, "-d", 501, "-n", "X", "--class-labels", tmp_path / "t.csv") == 2
    assert "nobody" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_to_the_same_dataset(two_patients, raw, tmp_path, monkeypatch):
    places = ("--key-file", tmp_path / "key", "--local")
    prepare("-i", two_patients, "-d", 502, "-n", "X", *places, tmp_path / "whole")
    read = []

    def interrupted(*arguments):
        read.append(arguments)
        if len(read) == 2:
            raise KeyboardInterrupt
        return read_planes(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("nnssl_plugin.intake.dicom.convert.read_planes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_dicom_dataset(
                two_patients, 501, "X", DicomChoice(key_file=tmp_path / "key", local=tmp_path / "cut"), processes=1
            )
    prepare("-i", two_patients, "-d", 501, "-n", "X", *places, tmp_path / "cut")
    whole, cut = raw / "Dataset502_X", raw / "Dataset501_X"
    for kind in ("imagesTr", "labelsTr"):
        names = sorted(path.name for path in (whole / kind).iterdir())
        assert names == sorted(path.name for path in (cut / kind).iterdir()) and len(names) == 3
        assert all((whole / kind / name).read_bytes() == (cut / kind / name).read_bytes() for name in names)


@pytest.mark.slow
def test_worker_processes_give_the_same_scans(two_patients, raw, tmp_path):
    places = ("--key-file", tmp_path / "key", "--local")
    prepare("-i", two_patients, "-d", 501, "-n", "X", *places, tmp_path / "one")
    choice = DicomChoice(key_file=tmp_path / "key", local=tmp_path / "two")
    prepare_dicom_dataset(two_patients, 502, "X", choice, processes=2)
    one, two = (sorted((raw / f"Dataset{n}_X" / "imagesTr").iterdir()) for n in (501, 502))
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-d", 501, "-n", "../x"), "name"),
        (("-d", 1000, "-n", "X"), "1000"),
        (("-d", 501, "-n", "X", "--modality", "grey"), "grey"),
        (("-d", 501, "-n", "X", "--series", "Modelity=MR"), "Did you mean Modality"),
        (("-d", 501, "-n", "X", "--series", "MR"), "no condition"),
        (("-d", 501, "-n", "X", "--structures", "A=1", "--class-labels", "t.csv"), "two kinds"),
        (("-d", 499, "-n", "X"), "already belongs to Dataset499_Theirs"),
        (("-d", 498, "-n", "Foreign"), "was not made by prepare"),
        (("-d", 501, "-n", "X", "--modalities", "T1=*t1*"), "NAME=RULE"),
        (("-d", 501, "-n", "X", "--modalities", "T1=Modality=MR", "T1=Modality=CT"), "name of its own"),
        (("-d", 501, "-n", "X", "--modalities", "T1=Modality=MR", "--modality", "MR"), "Leave out --modality"),
        (("-d", 501, "-n", "X", "--modalities", "T1=Modality=MR", "--labels", "*seg*"), "--structures"),
        (("-d", 501, "-n", "X", "--labels"), "--structures"),
        (("-d", 501, "-n", "X", "--suffix", "T1w"), "--series RULE"),
        (("-d", 501, "-n", "X", "-num_parts", 2, "-part_id", 0), "one run"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_converted(words, message, export, raw, capsys):
    write_series(export, phantom())
    for name in ("Dataset499_Theirs", "Dataset498_Foreign"):
        (raw / name).mkdir()
    assert prepare("-i", export, *words) == 2
    assert message in capsys.readouterr().err and not any(raw.rglob("*.nii.gz"))


def test_a_wrong_choice_leaves_the_dataset_as_it_is(two_patients, raw):
    prepare("-i", two_patients, "-d", 501, "-n", "X")
    before = sorted(path.name for path in raw.rglob("*.nii.gz"))
    assert prepare("-i", two_patients, "-d", 501, "-n", "X", "--series", "SeriesDescription=typo") == 2
    assert sorted(path.name for path in raw.rglob("*.nii.gz")) == before
    assert prepare("-i", two_patients, "-d", 501, "-n", "X") == 0


def test_an_export_that_is_not_there_says_so(tmp_path, raw, capsys):
    assert prepare("-i", tmp_path / "none", "-d", 501, "-n", "X", "--series", "Modality=MR") == 2
    assert "is not there" in capsys.readouterr().err


def test_series_of_several_modalities_are_told_and_stand_in_the_table(two_patients, raw, capsys):
    write_series(two_patients / "ct", phantom(seed=5), modality="CT")
    assert prepare("-i", two_patients, "-d", 501, "-n", "X") == 2
    assert "--modality MR" in capsys.readouterr().err
    with (raw / ".nnssl_plugin" / "Dataset501_X" / "series.csv").open() as stream:
        assert {row["reason"] for row in csv.DictReader(stream)} == {
            "series of several modalities, and none was chosen"
        }


@pytest.fixture
def studies(export):
    """Three studies: CT and PET with a contour on the CT, CT alone, and CT with two PET; all on one grid."""
    patients, angles = [], np.linspace(0, 6, 40)
    contour = np.stack([-16 + 6 * np.cos(angles), -6 + 6 * np.sin(angles), np.full(40, 14.0)], axis=1)
    for number, others in enumerate([["T1"], [], ["T1", "T1 again"]]):
        study, patient = generate_uid(), {"PatientID": f"Secret-{number}"}
        folder, planes = export / str(number), phantom(seed=number)
        images = write_series(folder / "ct", planes, modality="CT", uids=(study, generate_uid()), **patient)
        structure_set(folder / "rs.dcm", images, {"GTV_1": [contour]})
        for name in others:
            uids = (study, generate_uid())
            write_series(folder / name, phantom(seed=9 + number), uids=uids, SeriesDescription=name, **patient)
        patients.append(study)
    return export


CHANNELS = ("--modalities", "T1=SeriesDescription~T1", "CT=Modality=CT")


def test_series_of_a_study_become_channels_of_a_case(studies, raw, capsys):
    words = ("-i", studies, "-d", 501, "-n", "X", *CHANNELS)
    assert prepare(*words) == 1
    printed = capsys.readouterr().out
    assert "2 series of its study are T1" in printed and "cases without T1: 2" in printed
    folder = raw / "Dataset501_X"
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "CT"}
    present = json.loads((folder / "modalities.json").read_text())
    assert sorted(present.values()) == [[0, 1], [1], [1]] and len(list((folder / "imagesTr").iterdir())) == 6
    (both,) = (case for case, channels in present.items() if len(channels) == 2)
    values = [np.asarray(nibabel.load(folder / "imagesTr" / f"{both}_000{k}.nii.gz").dataobj) for k in (0, 1)]
    assert np.array_equal(values[0].T, phantom(seed=9)) and np.array_equal(values[1].T, phantom(seed=0) - 1024.0)
    with (folder / "subjects.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["case"] for row in rows} == set(present) and len({row["subject"] for row in rows}) == 3
    assert not any(path.is_symlink() for path in (folder / "imagesTr").iterdir())
    assert prepare(*words) == 1 and "0 cases added, 3 known" in capsys.readouterr().out


def test_structures_of_a_study_label_all_its_channels(studies, raw):
    prepare("-i", studies, "-d", 501, "-n", "X", *CHANNELS, "--structures", "GTV*=1", "none*=2")
    folder = raw / "Dataset501_X"
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "GTV": 1, "none": 2}
    labels = [np.asarray(nibabel.load(path).dataobj) for path in (folder / "labelsTr").iterdir()]
    assert len(labels) == 3 and all(set(np.unique(array)) == {0, 1} for array in labels)


def test_a_series_that_two_modalities_name_is_refused(studies, raw, capsys):
    prepare(
        "-i", studies, "-d", 501, "-n", "X", "--modalities", "A=Modality=MR", "B=SeriesDescription~T1", "C=Modality=CT"
    )
    assert "several of --modalities name it (A, B)" in capsys.readouterr().out


def test_what_becomes_of_the_series_is_told_before_the_first_is_converted(two_patients, raw, monkeypatch):
    read, told = [], []
    monkeypatch.setattr(
        "nnssl_plugin.intake.dicom.convert.read_planes", lambda *words: read.append(1) or read_planes(*words)
    )
    choice = DicomChoice(series=["SeriesDescription~T1"])
    prepare_dicom_dataset(
        two_patients,
        501,
        "X",
        choice,
        processes=1,
        ahead=lambda rows: told.append(([r["status"] for r in rows], len(read))),
    )
    ((statuses, before),) = told
    assert sorted(statuses) == ["left out", "taken", "taken"] and before == 0 and len(read) == 2


def test_channels_on_other_grids_are_refused_with_both_or_resampled(export, raw, capsys):
    study = generate_uid()
    write_series(export / "a", phantom(seed=1), uids=(study, generate_uid()), SeriesDescription="A")
    write_series(
        export / "b", phantom(seed=2), uids=(study, generate_uid()), SeriesDescription="B", origin=(-28.0, -20.0, 5.0)
    )
    words = ("-i", export, "-d", 501, "-n", "X", "--modalities", "A=SeriesDescription=A", "B=SeriesDescription=B")
    assert prepare(*words) == 1
    assert "0 cases added" in (printed := capsys.readouterr().out) and "another grid" in printed
    assert prepare(*words, "--resample") == 0
    assert len(list((raw / "Dataset501_X" / "imagesTr").iterdir())) == 2
