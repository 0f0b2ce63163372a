"""The report of a small made-up folder: one file, nothing from outside, numbers as computed here once more."""

import base64
import re
from html.parser import HTMLParser

import nibabel
import numpy as np
import pytest
import torch

from nnssl_plugin.data.triplets import Triplet, write_triplets
from nnssl_plugin.io.files import write_json
from nnssl_plugin.quickstart.report import write_report
from nnssl_plugin.quickstart.results import ALL_LABELS, describe_dice, read_scores, spread
from nnssl_plugin.quickstart.scans import Selection, Setting
from nnssl_plugin.quickstart.state import State
from nnssl_plugin.quickstart.steps import ARMS, PRETRAINING, TARGET, fold_folder, titles
from nnssl_plugin.training.pictures import draw_pictures

CASES = ("case_a", "case_b", "case_c")
LABELS = {"liver <left> & more": 1, "kidney": 2}
SHAPE = (10, 12, 6)
DICE = {
    "pretrained": np.array([[0.9, 0.5], [0.8, np.nan], [0.7, 0.3]]),
    "scratch": np.array([[0.85, 0.6], [0.6, np.nan], [0.75, 0.1]]),
}
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Images, links, tables and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.images, self.addresses, self.tables, self.open, self.text, self.tags = [], [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        if tag == "table":
            self.tables.append({"rows": [], "scopes": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")
            self.tables[-1]["scopes"] += [attributes["scope"]] if tag == "th" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1]["rows"][-1][-1] += data


def save(path, array, spacing=(1.0, 1.5, 3.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def pretend_pretraining(folder):
    """The files of a pretraining that the report reads."""
    raw = folder / "nnUNet_raw" / PRETRAINING
    rng = np.random.default_rng(0)
    triplets = [
        Triplet(f"scan{i}", plane, 3, n, f"A slice <{i}>.", "me")
        for i, (plane, n) in enumerate([("axial", 6), ("coronal", 12), ("sagittal", 10)])
    ]
    for triplet in triplets:
        save(raw / "imagesTr" / f"{triplet.case}_0000.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
    write_triplets(raw, triplets)
    fold = fold_folder(folder)
    picture = [(title, torch.rand(6, 6, 6)) for title in ("input", "corrupted", "reconstruction")]
    for epoch in range(3):
        draw_pictures(picture, fold / "figures" / f"reconstruction_epoch_{epoch:04d}.png")
    log = {name: [3.0, 2.0, 1.5] for name in ("train_losses", "val_losses", "train/a", "val/a", "train/b", "val/b")}
    torch.save({"logging": log}, fold / "checkpoint_final.pth")


def pretend_finetuning(folder):
    """The files of both arms that the report reads; the second case lacks the second label."""
    raw = folder / "nnUNet_raw" / TARGET
    for arm in ARMS:
        fold_folder(folder, arm).mkdir(parents=True)
        series = [np.float32(value) for value in (0.5, 0.2)]  # as stock nnU-Net logs
        log = {name: series for name in ("train_losses", "val_losses", "mean_fg_dice")}
        torch.save({"logging": log}, fold_folder(folder, arm) / "checkpoint_final.pth")
        rows = [
            {
                "reference_file": f"/x/{case}.nii.gz",
                "metrics": {str(i + 1): {"Dice": DICE[arm][row, i]} for i in range(2)},
            }
            for row, case in reversed(list(enumerate(CASES)))
        ]
        write_json(folder / "predictions" / arm / "summary.json", {"metric_per_case": rows})
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:6, 2:6, 1:4], truth[6:9, 6:9, 3:5] = 1, 2
    for case in CASES:
        save(raw / "imagesTs" / f"{case}_0000.nii.gz", np.random.default_rng(1).normal(size=SHAPE).astype(np.float32))
        save(raw / "labelsTs" / f"{case}.nii.gz", truth * (truth < 2) if case == "case_b" else truth)
        save(folder / "predictions" / "pretrained" / f"{case}.nii.gz", np.roll(truth, 1, axis=0))
        save(folder / "predictions" / "scratch" / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))  # finds nothing


def finished(folder, *, labelled):
    state = State(folder, Setting(images="/data/<my> scans", labels="/data/labels" if labelled else None))
    tests = {"training": tuple("abcdef"), "test": CASES, "labels": LABELS} if labelled else {}
    state.select(Selection("CT", ("scan0", "scan1", "scan2"), notes=("2 of 5 <scans> & more",), **tests))
    for number, title in enumerate(titles(labelled=labelled)[:-1]):
        state.record(title, seconds=number + 0.4, done=True, command=f"run {title} <now> {folder}/scans")
    pretend_pretraining(folder)
    if labelled:
        pretend_finetuning(folder)
    path = write_report(folder, state)
    return folder, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("labelled"), labelled=True)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("unlabelled"), labelled=False)


@pytest.mark.slow
@pytest.mark.parametrize("report", ["labelled", "unlabelled"])
def test_the_report_stands_alone(report, request):
    _, text = request.getfixturevalue(report)
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)


@pytest.mark.slow
@pytest.mark.parametrize("report", ["labelled", "unlabelled"])
def test_every_picture_is_a_png_with_a_text_and_a_file_of_its_own(report, request):
    folder, text = request.getfixturevalue(report)
    page = Page(text)
    files = {path.read_bytes() for path in (folder / "report").glob("*.png")}
    shown = set()
    for image in page.images:
        assert len(image["alt"]) > 20
        data = base64.b64decode(image["src"].partition(",")[2], validate=True)
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        shown.add(data)
    assert shown == files


def test_every_test_case_has_its_contours(labelled):
    page = Page(labelled[1])
    contours = [image["alt"] for image in page.images if "contours" in image["alt"]]
    assert [alt.split(",")[0] for alt in contours] == ["Case 1", "Case 2", "Case 3"]
    assert "axial slice 4 of 6" in contours[0]  # the slice with both labels; the axis with 3 mm


def test_the_dice_table_holds_the_numbers(labelled):
    page = Page(labelled[1])
    header, *rows = next(t["rows"] for t in page.tables if t["rows"][0][0] == "label")
    assert header[1:4] == ["pretrained: mean", "pretrained: SD", "pretrained: min–max"]
    means = {arm: np.nanmean(DICE[arm], axis=1) for arm in ARMS}
    for row, (name, column) in zip(rows, [*zip(LABELS, (0, 1), strict=True), (ALL_LABELS, None)], strict=True):
        assert row[0] == name
        for place, arm in ((1, "pretrained"), (4, "scratch")):
            scores = means[arm] if column is None else DICE[arm][:, column]
            expected = f"{np.nanmean(scores):.3f}", f"{np.nanstd(scores, ddof=1):.3f}"
            assert tuple(row[place : place + 2]) == expected
            assert row[place + 2] == f"{np.nanmin(scores):.3f}–{np.nanmax(scores):.3f}"
    gap = means["pretrained"] - means["scratch"]
    assert rows[-1][7] == f"{gap.mean():+.3f}"
    low, high = map(float, rows[-1][8].split(" to "))
    assert gap.min() - 1e-3 <= low <= gap.mean() <= high <= gap.max() + 1e-3


def test_a_label_that_is_nowhere_is_no_number(labelled):
    page = Page(labelled[1])
    rows = {row[0]: row for row in next(t["rows"] for t in page.tables if t["rows"][0][0] == "case")}
    assert rows["case 2"][2] == "–" and rows["case 2"][1] == rows["case 2"][3] == "0.800"


def test_table_headers_have_a_scope(labelled):
    for table in Page(labelled[1]).tables:
        rows = table["rows"]
        assert table["scopes"] == ["col"] * len(rows[0]) + ["row"] * (len(rows) - 1)


def test_the_report_says_what_it_does_not_show(labelled):
    text = Page(labelled[1]).text
    assert "does not show what pretraining brings" in text
    assert "2 of 5 <scans> & more" in text and "run plan <now>" in text
    assert "prepare -i YOUR_SCANS -d 501 -n Unlabelled --modality CT" in text


@pytest.mark.parametrize("report", ["labelled", "unlabelled"])
def test_the_report_shows_no_names_of_cases_and_no_local_paths(report, request):
    folder, text = request.getfixturevalue(report)
    shown = Page(text).text + " ".join(image["alt"] for image in Page(text).images)
    assert not [name for name in (*CASES, "scan0", "scan1", "scan2", "/data/", str(folder)) if name in shown]
    assert "QUICKSTART/scans" in shown and "YOUR_SCANS" in shown


def test_the_full_size_commands_train_on_embeddings_of_trained_encoders(labelled):
    text = Page(labelled[1]).text
    commands = text.partition("For real")[2].partition("All commands")[0]
    assert commands.index("nnssl_plugin clip -d 501") < commands.index("-tr Med3DInsightPretrainer")
    assert "random encoders" in text.partition("For real")[0]


def test_without_labels_it_ends_with_pretraining(unlabelled):
    page = Page(unlabelled[1])
    assert "Dice" not in page.text.partition("For real")[0]
    assert "Reconstructions" in page.text and "Slices and captions" in page.text and "A slice <2>." in page.text
    assert describe_dice(unlabelled[0], Selection("MR", ())) == []


def test_first_and_last_reconstruction_are_shown(unlabelled):
    alts = [image["alt"] for image in Page(unlabelled[1]).images if "hidden" in image["alt"]]
    assert ["epoch 0:" in alts[0], "epoch 2:" in alts[1], len(alts)] == [True, True, 2]


def test_scores_follow_the_order_of_the_cases(labelled):
    scores = read_scores(labelled[0], Selection("CT", (), test=CASES, labels=LABELS))
    np.testing.assert_array_equal(scores.dice["pretrained"], DICE["pretrained"])


def test_the_spread_of_one_or_no_score():
    one, none = spread(np.array([0.5, np.nan])), spread(np.array([np.nan]))
    assert one.mean == one.low == one.high == 0.5 and np.isnan(one.sd)
    assert np.isnan(none.mean) and np.isnan(none.low)
