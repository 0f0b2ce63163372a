"""BrainMVP through the commands, on heads each of which lacks another modality: prepare, plan, pretrain, adapt."""

import nibabel
import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders
from small_unet import narrow

from nnssl_plugin.checkpoints.format.spatial_arrays import read_spatial_arrays
from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart.phantoms import MODALITIES, write_heads

pytestmark = pytest.mark.slow

DATASET, ID, PLAN, CASES = "Dataset906_Heads", "906", "brainmvp-small", 6
PRETRAINING = ("epochs=1", "iterations_per_epoch=4", "validation_iterations=1", "batch_size=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nnU-Net's folders after all commands."""
    root = tmp_path_factory.mktemp("heads")
    with nnunet_folders(root):
        scans = root / "scans"
        write_heads(scans, CASES, seed=1, shape=(24, 28, 24), spacing_mm=(4, 4, 4), complete=False)
        patterns = [f"{name}={name}.nii.gz" for name in MODALITIES]
        words = ["--modalities", *patterns, "--cases-by", "folder", "--keep", "-np", "1"]
        assert main(["prepare", "-i", str(scans), "-d", ID, "-n", "Heads", *words]) == 0
        command(root, "nnUNetv2_plan_and_preprocess", "-d", ID, "-c", "3d_fullres", "-npfp", "2", "-np", "2")
        small = narrow(root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json")
        assert main(["plan", "-d", ID, "-n", PLAN, "--preset", "brainmvp", "--set", small, *PRETRAINING]) == 0
        command(
            root, "nnUNetv2_train", ID, "3d_fullres", "all", "-p", PLAN, "-tr", "BrainMVPPretrainer", "-device", "cpu"
        )
        assert main(["adapt", "-d", ID, "-w", str(checkpoint(root)), "-p", PLAN, "-n", "pre"]) == 0
        yield root


def checkpoint(root):
    results = root / "nnUNet_results" / DATASET
    return results / f"BrainMVPPretrainer__{PLAN}__3d_fullres" / "fold_all" / "checkpoint_final.pth"


def test_each_case_lacks_another_modality(folder):
    present = read_json(folder / "nnUNet_raw" / DATASET / "modalities.json")
    assert [4 - len(channels) for channels in present.values()] == [1] * CASES
    assert len({tuple(channels) for channels in present.values()}) == 4


def test_the_checkpoint_holds_a_finite_network_and_a_template_of_each_modality(folder):
    content = torch.load(checkpoint(folder), weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in content["network_weights"].values())
    assert content["provenance"]["network_channels"] == 1 and content["ssl_state"]["step"] == 4
    array = read_spatial_arrays(checkpoint(folder))["templates"]
    assert array.names == MODALITIES and array.axes == ("IS", "PA", "LR")
    assert torch.count_nonzero(array.values) > 0


def test_its_log_tells_the_cost_and_its_figures_show_the_templates(folder):
    (log,) = checkpoint(folder).parent.glob("training_log_*.txt")
    assert "Templates: 4 x " in log.read_text()
    names = {path.name.partition("_epoch")[0] for path in (checkpoint(folder).parent / "figures").iterdir()}
    assert names == {"templates", "reconstruction"}


def test_adapt_carries_the_templates_and_inspect_writes_them(folder, tmp_path):
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    weights = preprocessed / f"{PLAN}-pre_3d_fullres.pth"
    carried = read_spatial_arrays(weights)["templates"]
    assert torch.equal(carried.values, read_spatial_arrays(checkpoint(folder))["templates"].values)
    assert main(["inspect", str(weights), "--arrays", str(tmp_path / "templates")]) == 0
    image = nibabel.load(tmp_path / "templates" / "templates_FLAIR.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms(), carried.spacing_mm[::-1])
    assert (tmp_path / "templates" / "templates.png").stat().st_size > 5000
