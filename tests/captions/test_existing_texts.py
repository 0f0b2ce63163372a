"""Texts that people have: tables, reports by case name, and folders of cases with a report and pictures."""

import json

import nibabel
import numpy as np
import pytest

from nnssl_plugin.captions.captioners import open_captioner, signature
from nnssl_plugin.captions.existing_texts import findings
from nnssl_plugin.captions.template import TemplateCaptioner
from nnssl_plugin.captions.triplets import caption_dataset
from nnssl_plugin.data.struck import strike
from nnssl_plugin.data.triplets import Triplet, by_case, read_triplets, write_triplets
from nnssl_plugin.errors import UserError


@pytest.fixture
def folder(raw, phantom):
    """Three cases without labels."""
    folder = raw / "Dataset011_Reports"
    (folder / "imagesTr").mkdir(parents=True)
    for case in ("a_1", "a_2", "b_1"):
        nibabel.save(nibabel.Nifti1Image(phantom(0), np.eye(4)), folder / "imagesTr" / f"{case}_0000.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz", "numTraining": 3}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def texts_of(folder, path, **how):
    """Case → {(plane, slice): text}, after captioning from ``path``; and the summary."""
    summary = caption_dataset(folder, open_captioner("file", {"texts": str(path)}), **how)
    cases = by_case(read_triplets(folder))
    return {case: {(t.plane, t.slice): t.text for t in slices} for case, slices in cases.items()}, summary


def test_a_table_gives_texts_of_cases_and_of_single_slices(folder, tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text(
        "Case,Plane,Slice,Text\n"
        'a_1,,,"A whole case,\nin two lines."\n'
        "a_2,axial,3,Axial three.\na_2,coronal,17,The last coronal one.\na_2,,,Not of any slice that has its own.\n"
        "other,,,Not of this dataset.\n",
        encoding="utf-8-sig",
    )
    texts, summary = texts_of(folder, table, slices=5)
    assert list(texts["a_1"].values()) == ["A whole case, in two lines."] * 5
    assert texts["a_2"] == {("axial", 3): "Axial three.", ("coronal", 17): "The last coronal one."}
    assert "b_1" not in texts and summary.unknown == ("b_1",) and (summary.added, summary.kept) == (7, 0)
    assert texts_of(folder, table, slices=5)[1].added == 0


def test_more_texts_of_a_case_than_slices_are_asked_for_are_all_taken(folder, tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text("case,plane,slice,text\n" + "".join(f"a_1,axial,{n},Slice {n}.\n" for n in range(16)))
    assert len(texts_of(folder, table, slices=2)[0]["a_1"]) == 16


def test_an_edited_table_is_taken_again_and_a_struck_slice_is_not(folder, tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text("case,plane,slice,text\na_1,axial,3,Three.\na_1,axial,4,Four.\n")
    texts_of(folder, table)
    (tmp_path / "bad.csv").write_text("case,plane,slice\na_1,axial,4\n")
    strike(folder, tmp_path / "bad.csv")
    table.write_text("case,plane,slice,text\na_1,axial,3,Drei.\na_1,axial,4,Vier.\n")
    assert texts_of(folder, table)[0]["a_1"] == {("axial", 3): "Drei."}


def test_a_line_of_another_does_not_count_as_one_of_the_table(folder, tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text("case,plane,slice,text\na_1,axial,3,Three.\na_1,axial,4,Four.\n")
    texts_of(folder, table)
    by_hand = Triplet("a_1", "coronal", 2, 18, "By hand.", "me")
    write_triplets(folder, [*read_triplets(folder), by_hand])
    table.write_text("case,plane,slice,text\na_1,axial,3,Drei.\na_1,axial,4,Vier.\n")
    found = {("axial", 3): "Drei.", ("axial", 4): "Vier.", ("coronal", 2): "By hand."}
    assert texts_of(folder, table)[0]["a_1"] == found


def test_reports_are_found_by_the_name_of_their_case_or_folder(folder, tmp_path):
    reports = tmp_path / "reports"
    for path, text in (
        ("a_1.txt", "Of a_1."),
        ("a/2/report.txt", "Of a_2, in its own folder."),
        ("a/2/ct/0001.png", "no text"),
        ("b/1.md", "Of b_1, by its path."),
        ("c/report.txt", "Of nobody, and not the only report.txt."),
    ):
        (reports / path).parent.mkdir(parents=True, exist_ok=True)
        (reports / path).write_text(text)
    texts, summary = texts_of(folder, reports, slices=1)
    found = {case: next(iter(slices.values())) for case, slices in texts.items()}
    assert found == {"a_1": "Of a_1.", "a_2": "Of a_2, in its own folder.", "b_1": "Of b_1, by its path."}
    assert summary.unknown == ()


def test_a_name_that_two_files_could_mean_stands_for_neither(folder, tmp_path):
    for site in "xy":
        (tmp_path / site).mkdir()
        (tmp_path / site / "a_1.txt").write_text(site)
    (tmp_path / "b_1.txt").write_text("Of b_1.")
    assert list(texts_of(folder, tmp_path)[0]) == ["b_1"]


def test_cases_without_a_text_can_get_the_templates_and_the_others_keep_theirs(folder, tmp_path):
    (tmp_path / "b_1.txt").write_text("Of b_1.")
    texts_of(folder, tmp_path, slices=2)
    caption_dataset(folder, TemplateCaptioner(), slices=2)
    by = {case: {t.captioner.split(" ")[0] for t in slices} for case, slices in by_case(read_triplets(folder)).items()}
    assert by == {"a_1": {"template"}, "a_2": {"template"}, "b_1": {"file"}}


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ("A plain report.\nWith: a colon.", "A plain report.\nWith: a colon."),
        ("title: x\nstudy_findings: A mass.\nIt is large.\ndiscussion: Long.", "A mass.\nIt is large."),
        ("Title: x\nStudy_Findings:\n\nDiscussion:\nLong.\n", "Long."),
        ("discussion: First.\nstudy_findings: Second.", "Second."),
        ("  \n", ""),
    ],
)
def test_the_findings_of_a_report_are_taken(report, text):
    assert findings(report) == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name,text\na_1,x\n", "has no column case"),
        ("case,text\na_1,\n", "line 2: a case or its text is missing"),
        ("case,text\na_1,x\na_1,y\n", "line 3: case a_1 has two texts"),
        ("case,plane,slice,text\na_1,oblique,1,x\n", "plane 'oblique', slice '1'"),
        ("case,plane,slice,text\na_1,axial,,x\n", "plane 'axial', slice ''"),
        ("case,plane,slice,text\na_1,axial,1,x\na_1,axial,1,y\n", "has two texts"),
        ("case,text\n", "holds no text"),
        ("", "has no column case and text"),
    ],
)
def test_malformed_tables_are_named_with_their_line(content, said, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=said):
        open_captioner("file", {"texts": str(tmp_path / "t.csv")})


def test_absent_and_unreadable_texts_are_named(tmp_path):
    for path in ("", str(tmp_path / "absent")):
        with pytest.raises(UserError, match="There are no texts") as caught:
            open_captioner("file", {"texts": path})
        assert "--texts PATH" in caught.value.remedy
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="cannot be read"):
        open_captioner("file", {"texts": str(tmp_path)})
    (tmp_path / "t.csv").write_bytes(b"case,text\na,\xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        open_captioner("file", {"texts": str(tmp_path / "t.csv")})


def test_a_slice_that_the_image_does_not_have_is_named(folder, tmp_path):
    (tmp_path / "t.csv").write_text("case,plane,slice,text\na_1,axial,16,x\n")
    with pytest.raises(UserError, match="text of axial slice 16, and 16 such slices"):
        texts_of(folder, tmp_path / "t.csv")


def test_the_signature_follows_the_texts_and_not_where_they_lie(tmp_path):
    for name, text in (("x", "one"), ("y", "one"), ("z", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
    first, second, third = (signature(open_captioner("file", {"texts": str(tmp_path / name)})) for name in "xyz")
    assert first == second != third
