"""`import nnssl_plugin as nnssl`: each function writes and says what its verb does, and nothing is imported before."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from dicom_export import phantom, write_series
from fake_dataset import NAME, fake_plan, write_fake_dataset

import nnssl_plugin as nnssl
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.cli.main import main
from nnssl_plugin.data.triplets import EMBEDDINGS_FILE, TRIPLETS_FILE
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.plans import build_network


def same_files(first: Path, second: Path, names) -> None:
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.fixture
def scans(save, source):
    for number in range(2):
        save(f"case_{number}.nii.gz", seed=number)
    save("flat.nii.gz", array=np.zeros((8, 9, 10), dtype=np.float32))
    return source


def test_importing_the_package_imports_neither_torch_nor_nnunet():
    said = "import sys, nnssl_plugin; print(sorted({'torch', 'nnunetv2', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert {name for name in nnssl.__all__ if callable(getattr(nnssl, name))} == set(nnssl.FUNCTIONS)
    assert set(nnssl.__all__) <= set(dir(nnssl))
    with pytest.raises(AttributeError, match="no attribute 'pretrain'"):
        _ = nnssl.pretrain


def test_prepare_makes_the_dataset_of_the_verb(raw, scans):
    made = nnssl.prepare(scans, 501, "Same", processes=1)
    assert main(["prepare", "-i", str(scans), "-d", "502", "-n", "Same", "-np", "1"]) == 1
    assert len(made.added) == 2 and len(made.rejected) == 1 and made.folder == raw / "Dataset501_Same"
    names = [path.relative_to(made.folder) for path in sorted(made.folder.rglob("*.*"))]
    assert len(names) >= 7
    same_files(made.folder, raw / "Dataset502_Same", names)


def test_prepare_takes_dicom_and_bids(raw, source, save, tmp_path):
    write_series(tmp_path / "export", phantom(), SeriesDescription="T1")
    made = nnssl.prepare(tmp_path / "export", 501, "Export", series=["SeriesDescription=T1"], processes=1)
    assert len(made.added) == 1 and (made.folder / "subjects.csv").is_file()
    (source / "dataset_description.json").write_text("{}")
    for suffix in ("T1w", "T2w"):
        save(f"sub-01/anat/sub-01_{suffix}.nii.gz", seed=len(suffix) + ord(suffix[1]))
    made = nnssl.prepare(source, 502, "Bids", suffixes=["T1w"], processes=1)
    assert len(made.added) == 1 and "sub-01" in (made.folder / "subjects.csv").read_text()


def test_prepare_chooses_scans_by_patterns(raw, scans):
    chosen = nnssl.prepare(scans, 501, "One", include=["case_0*"], processes=1)
    left = nnssl.prepare(scans, 502, "Rest", exclude=["case_0*", "flat*"], processes=1)
    assert len(chosen.added) == len(left.added) == 1 and not chosen.rejected and not left.rejected
    sources = [(made.folder / "provenance.csv").read_text() for made in (chosen, left)]
    assert "case_0.nii.gz" in sources[0] and "case_1.nii.gz" in sources[1]
    assert "case_1.nii.gz" not in sources[0] and "case_0.nii.gz" not in sources[1]


def test_prepare_takes_a_table_of_classes(raw, scans, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("case,grade\ncase_0,low\ncase_1,high\n")
    made = nnssl.prepare(scans, 501, "Same", class_labels=table, targets=["grade:ordinal:low,high"], processes=1)
    arguments = ["-n", "Same", "--class-labels", str(table), "--target", "grade:ordinal:low,high", "-np", "1"]
    assert main(["prepare", "-i", str(scans), "-d", "502", *arguments]) == 0
    same_files(made.folder, raw / "Dataset502_Same", ["classification.csv", "dataset.json"])
    with pytest.raises(UserError, match="class-labels"):
        nnssl.prepare(scans, 503, "Same", targets=["grade"])


@pytest.mark.slow
def test_caption_writes_what_the_verb_writes(raw, scans):
    folders = [nnssl.prepare(scans, number, "Same", processes=1).folder for number in (501, 502)]
    written = nnssl.caption(501, body_part="left knee", seed=3, slices=3, options={"size": False})
    assert (
        main(
            ["caption", "-d", "502", "--body-part", "left knee", "--seed", "3", "--slices", "3", "--set", "size=false"]
        )
        == 0
    )
    assert written.path == folders[0] / EMBEDDINGS_FILE and (written.computed, written.reused) == (6, 0)
    same_files(*folders, [TRIPLETS_FILE])
    first, second = (np.load(folder / EMBEDDINGS_FILE) for folder in folders)
    assert set(first) == set(second) and all((first[key] == second[key]).all() for key in first)
    with pytest.raises(UserError, match="poet"):
        nnssl.caption(501, captioner="poet")


@pytest.fixture
def weights(nnunet_environment, tmp_path) -> Path:
    write_fake_dataset(cases=1)
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    torch.manual_seed(7)
    network = build_network(fake_plan(), "3d_fullres", read_json(folder / "dataset.json"))
    save_checkpoint({"network_weights": network.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_adapt_writes_what_the_verb_writes(weights):
    adapted = nnssl.adapt(NAME, name="function", weights=weights)
    assert main(["adapt", "-d", NAME, "-n", "verb", "-w", str(weights)]) == 0
    by_verb = adapted.plan.with_name("nnUNetPlans-verb.json")
    said = adapted.plan.read_text().replace("function", "verb")
    assert by_verb.read_text() == said
    first, second = (torch.load(adapted.plan.with_name(f"nnUNetPlans-{name}_3d_fullres.pth"), weights_only=True)
                     for name in ("function", "verb"))  # fmt: skip
    assert all(torch.equal(first["network_weights"][key], value) for key, value in second["network_weights"].items())


def test_inspect_says_what_the_verb_writes_as_json(weights, tmp_path):
    assert main(["inspect", str(weights), "--json", str(tmp_path / "report.json")]) == 0
    assert nnssl.inspect(weights) == read_json(tmp_path / "report.json")


@pytest.mark.slow
def test_evaluate_segmentation_scores_as_the_verb_does(tmp_path):
    pytest.importorskip("monai")
    rng = np.random.default_rng(0)
    for folder in ("reference", "one", "two"):
        (tmp_path / folder).mkdir()
        for case in range(3):
            mask = (rng.random((6, 7, 8)) > 0.5).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / folder / f"case_{case}.nii.gz")
    labels = tmp_path / "dataset.json"
    labels.write_text('{"channel_names": {"0": "MR"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}')
    runs = {name: tmp_path / name for name in ("one", "two")}
    options = {"references": tmp_path / "reference", "dataset_json": labels, "processes": 1}
    nnssl.evaluate_segmentation(runs, tmp_path / "function", **options)
    given = ["-i", *(f"{name}={folder}" for name, folder in runs.items()), "-o", str(tmp_path / "verb"), "-np", "1"]
    assert main(["evaluate", "segmentation", *given, "-ref", str(tmp_path / "reference"), "-djfile", str(labels)]) == 0
    same_files(tmp_path / "function", tmp_path / "verb", ["scores.csv"])
    assert len(list(csv.reader((tmp_path / "verb" / "scores.csv").open()))) > 6
