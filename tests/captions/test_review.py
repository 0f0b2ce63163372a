"""What a person sees of slices and texts, what is suspicious in them, and what becomes of those that are struck."""

import base64
import csv
import io
import json
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from nnssl_plugin.captions import review
from nnssl_plugin.captions.checks import suspicions
from nnssl_plugin.captions.overview import count_contents, describe_contents
from nnssl_plugin.captions.template import TemplateCaptioner
from nnssl_plugin.captions.triplets import caption_dataset
from nnssl_plugin.cli.main import main
from nnssl_plugin.data.struck import read_struck
from nnssl_plugin.data.triplets import Triplet, all_triplets, by_case, read_embeddings, read_triplets, write_triplets
from nnssl_plugin.errors import UserError


def line(text, case="c", plane="axial", index=0, **fields):
    return Triplet(case, plane, index, 20, **{"text": text, "captioner": "t", **fields})


@pytest.fixture
def folder(raw, phantom):
    """Four cases with two slices each by the template."""
    folder = raw / "Dataset012_Review"
    (folder / "imagesTr").mkdir(parents=True)
    for case in range(4):
        nibabel.save(nibabel.Nifti1Image(phantom(case), np.eye(4)), folder / "imagesTr" / f"c{case}_0000.nii.gz")
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0}, "file_ending": ".nii.gz", "numTraining": 4}
    (folder / "dataset.json").write_text(json.dumps(content))
    caption_dataset(folder, TemplateCaptioner(), slices=2, body_part="brain")
    return folder


GOOD = "This image is an axial MRI scan of the brain, showing both ventricles."


@pytest.mark.parametrize(
    ("text", "modality", "found"),
    [
        (GOOD, "MR", []),
        (GOOD, "T2w", []),
        (GOOD, "t1c", []),
        ("The T1 and T2 vertebrae are intact.", "CT", []),
        ("A T2-weighted picture of the knee.", "CT", ["names another modality: MRI (the scan is CT)"]),
        (GOOD, "", []),
        (GOOD, "CT", ["names another modality: MRI (the scan is CT)"]),
        ("A transverse CT scan of the abdomen.", "CT", []),
        ("A sagittal CT of the chest, axial in part.", "CT", []),
        ("A coronal CT of the chest.", "CT", ["names another plane: coronal (the slice is axial)"]),
        ("An ultrasound of the left breast.", "MR", ["names another modality: Ultrasound (the scan is MRI)"]),
        ("The patient’s pet dog is not a structure of act.", "PET", []),
        ("I'm sorry, but I can't help with medical images.", "MR", ["reads like a refusal"]),
        ("I’m unable to interpret this picture.", "MR", ["reads like a refusal"]),
        ("As an AI, I see shades of grey.", "MR", ["reads like a refusal"]),
        ("The spine is bright. " * 6, "MR", ["repeats itself"]),
        ("Yes.", "MR", ["hardly says anything"]),
        ("The ventricles are seen as dark areas, and the", "MR", ["breaks off"]),
    ],
)
def test_what_is_suspicious_is_told_and_nothing_else(text, modality, found):
    assert suspicions([line(text.strip())], lambda case: modality) == [found]


def test_one_text_for_many_cases_is_suspicious_and_for_many_slices_of_a_case_is_not():
    same = [line(GOOD, case=f"c{n}") for n in range(3)]
    assert suspicions(same, lambda case: "MR") == [["stands word for word with 3 cases"]] * 3
    assert suspicions([line(GOOD, index=n) for n in range(9)], lambda case: "MR") == [[]] * 9


def test_the_templates_own_texts_are_not_suspicious(folder):
    assert not any(suspicions(read_triplets(folder), lambda case: "MR"))


def test_the_table_counts_as_the_papers_does():
    triplets = [
        line("A CT of the abdomen with the liver and a large tumour."),
        line("The heart and lungs.", plane="coronal"),
        line("Soft tissue without a lesion.", plane="coronal", body_part="left knee"),
        line("Unremarkable parts, atlantic charter.", plane="sagittal"),
    ]
    table = count_contents(triplets, lambda case: "CT")
    assert table["Modalities"] == {"CT": 4} and table["Planes"] == {"Axial": 1, "Coronal": 2, "Sagittal": 1}
    assert table["Body parts"] == {"Chest": 1, "Abdomen": 1, "Limbs": 1}
    assert table["Internal organs"] == {"Heart": 1, "Lung": 1, "Liver": 1}
    assert table["Target types"] == {"Tissue": 1, "Organ": 2, "Tumor": 1, "Lesion": 1}
    assert count_contents(triplets, lambda case: "")["Modalities"] == {"CT": 1}
    assert count_contents(triplets, lambda case: "SPECT")["Modalities"] == {"SPECT": 4}
    assert describe_contents(count_contents([], lambda case: ""))[0] == "Modalities: none named"
    assert describe_contents(table)[1] == "Planes: Axial (1), Coronal (2), Sagittal (1)"


def test_the_page_shows_every_slice_and_text_escaped_and_loads_nothing(folder):
    lines = all_triplets(folder)
    evil = '<script>alert("x")</script> & </article> an ultrasound'
    write_triplets(folder, [Triplet(**{**vars(lines[-1]), "text": evil, "captioner": "openai"}), *lines[:-1]])
    made = review.write_review(folder)
    (page,) = made.pages
    html = page.read_text(encoding="utf-8")
    assert (made.triplets, made.suspicious, made.struck) == (8, 1, 0)
    assert "&lt;script&gt;alert(" in html and html.count("<script>") == 1 and html.count("<article") == 8
    assert html.index('data-case="c3"') < html.index('data-case="c0"')  # suspicious ones first
    assert "names another modality: Ultrasound (the scan is MRI)" in html and "Planes" in html
    pictures = re.findall(r'src="([^"]*)"', html)
    assert len(pictures) == 8 and not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,"))))
        assert max(image.size) == review.SIDE and np.asarray(image).std() > 20


def test_many_triplets_stand_on_several_pages_that_are_written_anew(folder, monkeypatch):
    monkeypatch.setattr(review, "PER_PAGE", 3)
    pages = review.write_review(folder).pages
    cases = [set(re.findall(r'data-case="(\w+)"', page.read_text())) for page in pages]
    assert cases == [{"c0", "c1"}, {"c2", "c3"}] and 'href="page_002.html"' in pages[0].read_text()
    monkeypatch.undo()
    assert len(review.write_review(folder).pages) == 1 and not pages[1].exists()


@pytest.mark.slow
def test_struck_triplets_are_out_of_use_everywhere_and_others_take_their_place(folder, tmp_path, capsys):
    bad = read_triplets(folder)[0]
    decisions = tmp_path / "list.csv"
    decisions.write_text(f"case,plane,slice,struck\n{bad.case},{bad.plane},{bad.slice},yes\n")
    assert main(["caption", "-d", "12", "--strike", str(decisions)]) == 0
    assert "1 newly struck, 0 taken back" in capsys.readouterr().out
    assert bad not in read_triplets(folder) and bad in all_triplets(folder) and read_struck(folder) == {bad.key}
    for seed in ("0", "5"):  # the same captions again, then others
        flags = ["--slices", "2", "--seed", seed, "--body-part", "brain"]
        assert main(["caption", "-d", "12", *flags]) == 0
        usable = read_triplets(folder)
        assert bad.key not in {t.key for t in usable} and bad in all_triplets(folder)
        assert {case: len(slices) for case, slices in by_case(usable).items()} == dict.fromkeys(by_case(usable), 2)
        assert len(read_embeddings(folder, usable)) == 8
        assert "Planes: " in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no embedding"):
        read_embeddings(folder, [bad])
    html = review.write_review(folder).pages[0].read_text()
    assert html.count('data-struck="yes"') == 1 and html.count("checked>") == 1


def test_a_strike_is_taken_back_and_survives_that_everything_is_described_anew(folder, tmp_path):
    first, second = read_triplets(folder)[:2]
    decisions = tmp_path / "list.csv"
    decisions.write_text(
        f"case,plane,slice\n{first.case},{first.plane},{first.slice}\n{second.case},{second.plane},{second.slice}\n"
    )
    assert main(["caption", "-d", "12", "--strike", str(decisions)]) == 0
    (folder / "triplets.jsonl").unlink()
    caption_dataset(folder, TemplateCaptioner(), slices=20)
    assert not {first.key, second.key} & {t.key for t in all_triplets(folder)}
    decisions.write_text(f"case,plane,slice,struck\n{first.case},{first.plane},{first.slice},no\n")
    assert main(["caption", "-d", "12", "--strike", str(decisions)]) == 0
    assert read_struck(folder) == {second.key}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("case,plane\nc0,axial\n", "has no column slice"),
        ("case,plane,slice\nc0,diagonal,1\n", "line 2: c0, diagonal, 1"),
        ("case,plane,slice\nc0,axial,x\n", "line 2"),
        ("case,plane,slice,struck\nc0,axial,1,maybe\n", "maybe"),
        ("case,plane,slice\nc0\n", "line 2"),
    ],
)
def test_malformed_lists_are_named_and_nothing_is_struck(folder, tmp_path, content, said, capsys):
    (tmp_path / "list.csv").write_text(content)
    assert main(["caption", "-d", "12", "--strike", str(tmp_path / "list.csv")]) == 2
    assert said in capsys.readouterr().err and read_struck(folder) == set()


def test_a_case_name_with_commas_and_quotes_survives_the_table(folder, tmp_path):
    decisions = tmp_path / "list.csv"
    with decisions.open("w", newline="") as stream:
        csv.writer(stream).writerows([["case", "plane", "slice"], ['a,"b"', "axial", 3]])
    for _ in range(2):
        assert main(["caption", "-d", "12", "--strike", str(decisions)]) == 0
        assert read_struck(folder) == {('a,"b"', "axial", 3)}


def test_review_of_the_command_says_where_the_pages_are(folder, capsys):
    assert main(["caption", "-d", "12", "--review", "--window", "50", "100"]) == 0
    printed = capsys.readouterr().out
    assert "8 texts, 0 suspicious, 0 struck" in printed and str(folder / "captions_review" / "page_001.html") in printed
    write_triplets(folder, [])
    with pytest.raises(UserError, match="no triplets to review"):
        review.write_review(folder)
