"""embed, search and index as a person runs them, and what they say."""

import re
import shlex

import nibabel
import numpy as np
import pytest
from PIL import Image
from retrieval_scans import write_scans
from small_checkpoint import checkpoint_of

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json


@pytest.fixture
def checkpoint(nnunet_environment, tmp_path):
    return str(checkpoint_of(tmp_path))


@pytest.fixture
def scans(tmp_path):
    return write_scans(tmp_path / "scans", 8)


@pytest.fixture
def folder(checkpoint, scans, tmp_path, capsys):
    index = str(tmp_path / "index")
    assert (
        main(["embed", "-m", checkpoint, "-i", str(scans), "-o", index, "--metadata", str(tmp_path / "cases.csv")]) == 0
    )
    said = capsys.readouterr().out
    assert "8 cases embedded" in said and "images/s" in said and "8 vectors" in said
    return index


def test_from_scans_to_a_contact_sheet(folder, scans, tmp_path, capsys):
    query = scans / "case_00_0000.nii.gz"
    assert main(["search", "--index", folder, "-q", str(query), "-k", "3", "-o", str(tmp_path / "found")]) == 0
    said = capsys.readouterr().out
    answer = read_json(tmp_path / "found" / "neighbours.json")["queries"][0]
    assert answer["subject"] == "subject_0" and len(answer["neighbours"]) == 3
    assert all(found["subject"] != "subject_0" for found in answer["neighbours"])
    assert [found["kind"] for found in answer["neighbours"]] == ["ball"] * 3
    distances = [found["distance"] for found in answer["neighbours"]]
    assert distances == sorted(distances) and f"{distances[0]:.4f}" in said
    with Image.open(tmp_path / "found" / "neighbours.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[1] >= 4 * 128 and pixels[:128, :128].std() > 10 and pixels[:128, 140:260].std() > 10
    page = (tmp_path / "found" / "neighbours.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and all(f"{each:.4f}" in page for each in distances)
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_cases_filters_same_subject_and_approximate(folder, capsys):
    assert main(["search", "--index", folder, "-q", "case_03", "--where", "kind=ball", "-k", "9", "--approximate"]) == 0
    said = capsys.readouterr().out
    assert "recall@10 against exact search 1.000" in said and "kind=stripes" not in said
    assert said.count("kind=ball") == 3  # case_02 is of its subject
    assert main(["search", "--index", folder, "-q", "case_03", "-k", "1", "--same-subject"]) == 0
    assert re.search(r"1\s+-?0\.0000  case_03", capsys.readouterr().out)


def test_index_grows_shrinks_and_describes_itself(folder, scans, tmp_path, checkpoint, capsys):
    more = write_scans(tmp_path / "more" / "scans", 2, first=8)
    assert main(["index", "add", "--index", folder, "-i", str(more)]) == 0
    assert "2 cases embedded" in capsys.readouterr().out
    assert main(["index", "info", "--index", folder]) == 0
    said = capsys.readouterr().out
    assert "10 vectors of 32" in said and "10 cases of 6 subjects" in said and "mean + maximum" in said
    assert main(["index", "remove", "--index", folder, "--where", "subject=subject_1"]) == 0
    assert "2 vectors removed, 8 left" in capsys.readouterr().out
    assert main(["search", "--index", folder, "-q", "case_02"]) == 2
    other = str(checkpoint_of(tmp_path / "other", seed=5))
    assert main(["index", "add", "--index", folder, "-i", str(scans), "-m", other]) == 2
    assert "cannot be compared" in capsys.readouterr().err


def test_a_raw_dataset_brings_its_classes(checkpoint, raw, scans, tmp_path, capsys):
    folder = raw / "Dataset907_Small"
    folder.mkdir()
    scans.rename(folder / "imagesTr")
    (tmp_path / "masks").rename(folder / "labelsTr")
    (folder / "classification.csv").write_text((tmp_path / "cases.csv").read_text())
    (folder / "dataset.json").write_text(
        '{"channel_names": {"0": "MR"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}'
    )
    index = str(tmp_path / "index")
    assert main(["embed", "-m", checkpoint, "-d", "907", "-o", index, "--rows", "lesion", "--view", "whole"]) == 0
    assert "16 vectors" in capsys.readouterr().out
    assert main(["search", "--index", index, "-q", "case_00", "-k", "2", "-o", str(tmp_path / "found")]) == 0
    answers = read_json(tmp_path / "found" / "neighbours.json")["queries"]
    assert [answer["query"] for answer in answers] == ["case_00/lesion_01", "case_00/lesion_02"]
    assert all(found["kind"] and found["volume_ml"] for answer in answers for found in answer["neighbours"])


def test_what_goes_wrong_is_said_in_words(folder, tmp_path, capsys):
    for arguments, said in (
        (["-q", "absent.nii.gz"], "absent.nii.gz"),
        (["-q", "case_00", "--where", "age=3"], "no column 'age'"),
        (["-q", "case_00", "-k", "0"], "0 neighbours"),
    ):
        assert main(["search", "--index", folder, *arguments]) == 2
        assert said in capsys.readouterr().err
    wrong = tmp_path / "x_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), wrong)
    assert main(["search", "--index", folder, "-q", str(wrong)]) == 2
    assert "constant" in capsys.readouterr().err


def test_a_moved_image_leaves_an_empty_tile(folder, scans, tmp_path):
    (scans / "case_02_0000.nii.gz").unlink()
    assert main(["search", "--index", folder, "-q", "case_00", "-o", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found" / "neighbours.png").is_file()


@pytest.mark.slow
def test_the_three_commands_of_the_page_run(repository, nnunet_environment, tmp_path, monkeypatch):
    page = (repository / "docs" / "how-to" / "retrieve.md").read_text("utf-8")
    commands = [shlex.split(line)[1:] for line in page.partition("```bash\n")[2].partition("```")[0].splitlines()]
    assert [words[0] for words in commands] == ["prepare", "embed", "search"]
    checkpoint_of(tmp_path)
    write_scans(tmp_path / "my_scans", 8)
    for file in (tmp_path / "my_scans").iterdir():
        file.rename(file.with_name(file.name.replace("_0000", "")))
    monkeypatch.chdir(tmp_path)
    assert [main([*words, *(["-np", "1"] if words[0] == "prepare" else [])]) for words in commands] == [0, 0, 0]
    answer = read_json(tmp_path / "neighbours" / "neighbours.json")["queries"][0]
    assert len(answer["neighbours"]) == 5 and "case_00" not in [found["case"] for found in answer["neighbours"]]
    assert (tmp_path / "neighbours" / "neighbours.html").is_file()
