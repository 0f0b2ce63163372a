"""The page that leads from a hospital's export to a pretraining: every command of it, on a small export."""

import shlex

import numpy as np
import pytest
from dicom_export import phantom, structure_set, write_series
from in_process import command
from pydicom.uid import generate_uid
from test_documentation import FENCE

from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer

PAGE = "docs/how-to/from-a-hospital-export.md"
pytestmark = pytest.mark.slow


@pytest.fixture
def export(tmp_path):
    """Five patients with a T1, a localiser and a contour each."""
    folder = tmp_path / "export"
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for number in range(5):
        study, patient = generate_uid(), {"PatientID": f"P{number}"}
        size = {"slices": 24, "rows": 40, "columns": 40, "seed": number}
        images = write_series(
            folder / f"{number}", phantom(**size), uids=(study, generate_uid()), spacing=(1.0, 1.0), step=(0, 0, 1.5),
            SeriesDescription="AX T1", SliceThickness=1.5, origin=(-20.0, -20.0, 0.0), **patient,
        )  # fmt: skip
        write_series(folder / f"{number}" / "scout", phantom(slices=3), uids=(study, generate_uid()), **patient)
        contours = [np.stack([6 * np.cos(angles), 6 * np.sin(angles), np.full(60, 1.5 * k)], 1) for k in range(8, 16)]
        structure_set(folder / f"{number}" / "rs.dcm", images, {"GTV_1": contours})
    return folder


def commands_of(page, **places):
    """The words of every command in the shell blocks of a page."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines() if language == "bash" else ():
            words = [places.get(word, word) for word in shlex.split(line, comments=True)]
            if words and words[0] not in ("pip", "export", "eval"):
                yield words


def test_every_command_of_the_page_runs(export, tmp_path, repository):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    ran = []
    for words in commands_of(repository / PAGE, EXPORT=str(export)):
        extra = {"prepare": ["-np", "1"], "nnUNetv2_plan_and_preprocess": ["-npfp", "1", "-np", "1"]}
        key = words[0] if words[0] != "nnssl_plugin" else words[1]
        device = ["-device", "cpu"] if key == "nnUNetv2_train" else []
        command(tmp_path, *words, *extra.get(key, []), *device)
        ran.append(key)
    assert ran.count("prepare") == 4 and "nnUNetv2_train" in ran
    fold = "Dataset501_Export/MAEPretrainer__trial__3d_fullres/fold_all/checkpoint_final.pth"
    assert (tmp_path / "nnUNet_results" / fold).is_file()
    for dataset in ("Dataset007_Tumours", "Dataset503_Brain"):
        assert len(list((tmp_path / "nnUNet_raw" / dataset / "labelsTr").iterdir())) == 5


@pytest.fixture
def folders(tmp_path, data_folder):
    """nnU-Net's folders, empty, and the real exports."""
    if not (data_folder / "dicom").is_dir():
        pytest.skip(f"no dicom below {data_folder}")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    return tmp_path, data_folder / "dicom"


def pretrain(root, source, number):
    """Prepare, plan and pretrain for two steps; the checkpoint."""
    command(root, "nnssl_plugin", "prepare", "-i", str(source), "-d", number, "-n", "Real", "-np", "1")
    plan(root, number)
    short = ("epochs=1", "warmup_epochs=0", "iterations_per_epoch=2", "validation_iterations=1", "batch_size=1")
    command(root, "nnssl_plugin", "plan", "-d", number, "-p", "small", "-n", "tiny", "--set", *short)
    command(root, *f"nnUNetv2_train {number} 3d_fullres all -tr MAEPretrainer -p tiny -device cpu".split())
    model = root / "nnUNet_results" / f"Dataset{number}_Real" / "MAEPretrainer__tiny__3d_fullres"
    return model / "fold_all" / "checkpoint_final.pth"


def plan(root, number):
    words = f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -npfp 1 -np 1 -overwrite_plans_name small"
    command(root, *words.split(), "-gpu_memory_target", "1.2")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ct_totalseg_20slices", "mr_btp_study3"])
def test_real_exports_are_pretrained_on(name, folders):
    root, exports = folders
    assert pretrain(root, exports / name, "501").is_file()


@pytest.mark.nightly
def test_a_real_export_with_structures_is_fine_tuned_on(folders, monkeypatch):
    root, exports = folders
    # predicting the whole case takes minutes on a CPU
    monkeypatch.setattr(PretrainedSegmentationTrainer, "perform_actual_validation", lambda *a, **k: None)
    checkpoint = pretrain(root, exports / "sts_002", "501")
    words = ("prepare", "-i", str(exports / "sts_002"), "-d", "504", "-n", "Gtv", "--modality", "CT", "-np", "1")
    command(root, "nnssl_plugin", *words, "--structures", "GTV=1")
    plan(root, "504")
    command(root, "nnssl_plugin", "adapt", "-d", "504", "-w", str(checkpoint), "-p", "small", "-n", "ft")
    short = [f"finetuning.{text}" for text in ("epochs=1", "iterations_per_epoch=2", "validation_iterations=1")]
    command(root, "nnssl_plugin", "plan", "-d", "504", "-p", "small-ft", "-n", "tiny", "--set", *short)
    trained = "nnUNetv2_train 504 3d_fullres all -tr PretrainedSegmentationTrainer -p tiny -device cpu"
    command(root, *trained.split())
    model = root / "nnUNet_results" / "Dataset504_Gtv" / "PretrainedSegmentationTrainer__tiny__3d_fullres"
    assert (model / "fold_all" / "checkpoint_final.pth").is_file()
