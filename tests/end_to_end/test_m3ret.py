"""M3Ret through nnU-Net's own commands: volumes and flat images pretrain one encoder, which is fine-tuned for
segmentation of volumes, of their slices, and for classification, and predicts."""

import json

import numpy as np
import pytest
from in_process import command, nnunet_folders, predict
from labelled_phantoms import assert_predicted, write_labelled_phantoms
from skimage import io
from small_patch_vit import ARGUMENTS

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target, write_class_labels

pytestmark = pytest.mark.slow

VOLUMES, PICTURES = "Dataset905_Volumes", "Dataset906_Pictures"
SHAPE, SPACING_MM = (16, 32, 32), (3, 2, 2)
TRAINERS = {"m3ret-mae": "M3RetMAEPretrainer", "m3ret-simdino": "M3RetSimDINOPretrainer"}
SMALL = {
    "m3ret-mae": ("method.decoder_width=24", "method.decoder_blocks=1", "method.decoder_heads=2"),
    "m3ret-simdino": ("method.hidden=16", "method.width=8", "method.local_views=1"),
}
PRETRAINING = ("epochs=1", "iterations_per_epoch=4", "validation_iterations=1", "warmup_epochs=0")
FINETUNING = ("finetuning.epochs=1", "finetuning.iterations_per_epoch=2", "finetuning.validation_iterations=1")
CLASSIFYING = ("classification.epochs=1", "classification.iterations_per_epoch=2", "classification.batch_size=2")
SIZES = ("configurations.3d_fullres.patch_size=[8,32,32]", "configurations.2d.patch_size=[32,32]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both datasets planned, both objectives pretrained on them together, everything fine-tuned from SimDINO's."""
    root = tmp_path_factory.mktemp("m3ret")
    with nnunet_folders(root):
        write_volumes(root / "nnUNet_raw" / VOLUMES)
        write_pictures(root / "pictures")
        assert main(["prepare", "-i", str(root / "pictures"), "-d", "906", "-n", "Pictures"]) == 0
        command(root, "nnUNetv2_plan_and_preprocess", "-d", "905", "-c", "2d", "3d_fullres", "-np", "2", "2")
        command(root, "nnUNetv2_plan_and_preprocess", "-d", "906", "-c", "2d", "-np", "2")
        for method, trainer in TRAINERS.items():
            plan(method)
            train(root, "905", "3d_fullres", "all", method, trainer)
        weights = fold_of(root, "M3RetSimDINOPretrainer", "m3ret-simdino", "3d_fullres", "all") / "checkpoint_final.pth"
        for configuration, more in (("3d_fullres", []), ("2d", ["--inflate"])):
            words = ["-w", str(weights), "-p", "m3ret-simdino", "-n", configuration, "-c", configuration]
            assert main(["adapt", "-d", "905", *words, *more]) == 0
            name = f"m3ret-simdino-{configuration}"
            train(root, "905", configuration, "0", name, "PretrainedSegmentationTrainer")
            images, predictions = root / "nnUNet_raw" / VOLUMES / "imagesTs", root / "predictions" / configuration
            predict(root, images, predictions, dataset="905", plan=name, configuration=configuration)
        train(root, "905", "3d_fullres", "0", "m3ret-simdino-3d_fullres", "PretrainedClassificationTrainer")
        yield root


def write_volumes(raw):
    """Five labelled cases with a class each, and one to predict."""
    write_labelled_phantoms(raw, shape=SHAPE, spacing_mm=SPACING_MM)
    cases = sorted(path.name.removesuffix("_0000.nii.gz") for path in (raw / "imagesTr").iterdir())
    target = Target("kind", "binary", ("no", "yes"))
    values = {case: number % 2 for number, case in enumerate(cases)}
    write_class_labels(raw, ClassLabels((target,), {case: case for case in cases}, {"kind": values}))


def write_pictures(folder):
    """Six grey images of different sizes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        size = rng.integers(30, 60, 2)
        rows, columns = np.indices(size)
        picture = 128 + 90 * np.sin(rows / (3 + number)) * np.cos(columns / 5) + rng.normal(0, 8, size)
        io.imsave(folder / f"picture_{number}.png", picture.clip(0, 255).astype(np.uint8), check_contrast=False)


def plan(method):
    """Plans of a small transformer for a method, with both datasets as sources."""
    network = [
        f"configurations.{configuration}.architecture.arch_kwargs.{name}={json.dumps(value)}"
        for configuration, axes in (("3d_fullres", 3), ("2d", 2))
        for name, value in (ARGUMENTS | {"patch_size": ARGUMENTS["patch_size"][-axes:]}).items()
    ]
    sources = [
        {"dataset": "905", "plans": method, "kind": "MR", "batch_size": 2},
        {"dataset": "906", "plans": "sized", "configuration": "2d", "kind": "picture", "batch_size": 2},
    ]
    if method == "m3ret-mae":
        assert main(["plan", "-d", "906", "-n", "sized", "--set", SIZES[1]]) == 0
    words = ["plan", "-d", "905", "-n", method, "--preset", "patch-vit-t", method, "--set", *network, *SIZES]
    assert (
        main([*words, *PRETRAINING, *SMALL[method], *FINETUNING, *CLASSIFYING, f"sources={json.dumps(sources)}"]) == 0
    )


def train(root, dataset, configuration, fold, plan, trainer):
    command(root, "nnUNetv2_train", dataset, configuration, fold, "-p", plan, "-tr", trainer, "-device", "cpu")


def fold_of(root, trainer, plan, configuration, fold):
    return root / "nnUNet_results" / VOLUMES / f"{trainer}__{plan}__{configuration}" / f"fold_{fold}"


@pytest.mark.parametrize(("method", "trainer"), TRAINERS.items())
def test_each_kind_has_numbers_and_pictures(trained, method, trainer):
    folder = fold_of(trained, trainer, method, "3d_fullres", "all")
    drawn = {path.name for path in (folder / "figures").glob("*.png")}
    assert (folder / "progress.png").is_file()
    for kind in ("MR", "picture"):
        assert any(kind in name for name in drawn)


def test_provenance_names_both_datasets_and_three_channels(trained, capsys):
    weights = fold_of(trained, "M3RetMAEPretrainer", "m3ret-mae", "3d_fullres", "all") / "checkpoint_final.pth"
    assert main(["inspect", str(weights)]) == 0
    printed = capsys.readouterr().out
    assert VOLUMES in printed and PICTURES in printed and "3 channels" in printed


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_the_whole_encoder_is_fine_tuned_and_predicts_volumes(trained, configuration):
    name = f"m3ret-simdino-{configuration}_{configuration}_report.json"
    report = read_json(trained / "nnUNet_preprocessed" / VOLUMES / name)
    assert report["coverage"]["encoder"] == 1.0
    assert_predicted(trained / "predictions" / configuration, trained / "nnUNet_raw" / VOLUMES)


def test_it_is_fine_tuned_for_classification(trained):
    folder = fold_of(trained, "PretrainedClassificationTrainer", "m3ret-simdino-3d_fullres", "3d_fullres", "0")
    assert (folder / "checkpoint_final.pth").is_file()
