"""``docs/how-to/use-a-foundation-model.md``: its own commands, on twenty phantoms and files in published layouts."""

import shlex
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from in_process import command
from published_layouts import nnfoundation_cnn, nnfoundation_vit, small_res_enc_l
from small_segresnet import ARGUMENTS
from test_documentation import FENCE

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.segresnet import SegResNetDS
from nnssl_plugin.quickstart.phantoms import write_phantoms

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "use-a-foundation-model.md"
DATASET, SHAPE, CASES = "Dataset007_Phantoms", (24, 32, 32), 20
SMALL = {
    "nnUNetv2_plan_and_preprocess": ["-npfp", "1"],
    "nnssl_plugin plan": [
        "--set",
        "finetuning.epochs=1",
        "finetuning.iterations_per_epoch=2",
        "finetuning.validation_iterations=1",
    ],
    "nnUNetv2_preprocess": ["-np", "1"],
    "nnUNetv2_train": ["-device", "cpu"],
}
"""What is added to a command for a test's sake."""


def section(heading: str) -> list[list[str]]:
    """The commands of the first shell block below a heading of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    block = next(block for language, block in FENCE.findall(text) if language == "bash")
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def place(words: list[str]) -> str:
    """The part of a command that says what it does."""
    return " ".join(words[:2]) if words[0] == "nnssl_plugin" else words[0]


def run_page(root, file, *, instead: dict[str, list[str]] | None = None, table: str = "") -> dict[str, str]:
    """Run the page's commands on a file; what each printed."""
    printed = {}
    for words in section("Five commands"):
        words = (instead or {}).get(place(words), words)
        words = [{"FILE": str(file), "ct-fm": table}.get(word, word) for word in words]
        printed[place(words)] = command(root, *words, *SMALL.get(place(words), []))
    return printed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """nnU-Net's folders with twenty labelled phantoms, and networks that are named only, at a small size."""
    root = tmp_path_factory.mktemp("foundation")
    raw = root / "nnUNet_raw" / DATASET
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
    write_phantoms(raw / "imagesTr", CASES, seed=1, shape=SHAPE, spacing_mm=(1, 1, 1), labels_folder=raw / "labelsTr")
    labels = {"background": 0, "liver": 1, "kidney": 2}
    described = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": CASES, "file_ending": ".nii.gz"}
    write_json(raw / "dataset.json", described)
    with pytest.MonkeyPatch.context() as patch:
        small_res_enc_l(patch)
        yield root


def finished(root, printed):
    """What the commands left, which the next file replaces; the plan is taken away so that they can run again."""
    preprocessed = root / "nnUNet_preprocessed" / DATASET
    fold = root / "nnUNet_results" / DATASET / "PretrainedSegmentationTrainer__foundation-theirs__3d_fullres" / "fold_0"
    left = SimpleNamespace(
        plan=read_json(preprocessed / "foundation.json"),
        report=read_json(preprocessed / "foundation-theirs_3d_fullres_report.json"),
        adapted=torch.load(preprocessed / "foundation-theirs_3d_fullres.pth", weights_only=True)["network_weights"],
        tuned=torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"],
        validated=read_json(fold / "validation" / "summary.json"),
        predicted=[nibabel.load(path).get_fdata() for path in sorted((fold / "validation").glob("*.nii.gz"))],
        printed=printed,
    )
    fold.parent.rename(root / f"results of {len(list(root.iterdir()))}")
    for path in preprocessed.glob("foundation*.*"):
        path.unlink()
    return left


def assert_fine_tuned(left, source, prefixes):
    assert left.report["coverage"]["encoder"] == 1.0
    encoder = [key for key in left.adapted if key.startswith(prefixes) and left.adapted[key].is_floating_point()]
    assert encoder and all(torch.equal(left.adapted[key], source[key]) for key in encoder)
    moved = [key for key in encoder if not torch.equal(left.adapted[key], left.tuned[key])]
    assert len(moved) > len(encoder) / 2
    assert all(torch.isfinite(value).all() for value in left.tuned.values() if value.is_floating_point())
    assert len(left.predicted) == len(left.validated["metric_per_case"]) == CASES // 5
    assert all(image.shape == SHAPE[::-1] and set(np.unique(image)) <= {0, 1, 2} for image in left.predicted)


def test_the_page_names_five_commands_in_their_order():
    commands = section("Five commands")
    assert [place(words) for words in commands] == [
        "nnUNetv2_plan_and_preprocess",
        "nnssl_plugin plan",
        "nnUNetv2_preprocess",
        "nnssl_plugin adapt",
        "nnUNetv2_train",
    ]
    assert [place(words) for words in section("CT-FM and VoCo")] == ["nnssl_plugin plan", "nnssl_plugin adapt"]


@pytest.mark.parametrize(
    ("layout", "prefixes"),
    [(nnfoundation_cnn, ("encoder.",)), (nnfoundation_vit, ("eva.", "down_projection."))],
    ids=["nnFoundation CNN", "nnFoundation ViT"],
)
def test_nnfoundation_is_fine_tuned_by_the_pages_commands(layout, prefixes, root, tmp_path):
    content = layout()
    torch.save(content, tmp_path / "checkpoint_final.pth")
    assert "every case at its own spacing" in command(
        root, "nnssl_plugin", "inspect", str(tmp_path / "checkpoint_final.pth")
    )
    left = finished(root, run_page(root, tmp_path / "checkpoint_final.pth"))
    configuration = left.plan["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["data_identifier"] == "foundation_3d_fullres"
    assert "the pretraining saw every case at its own spacing" in left.printed["nnssl_plugin adapt"]
    assert_fine_tuned(left, content["network_weights"], prefixes)


def test_ct_fm_is_fine_tuned_by_the_pages_commands(root, tmp_path):
    torch.manual_seed(2)
    encoder = SegResNetDS(1, 2, **ARGUMENTS).encoder.state_dict()
    torch.save({"state_dict": {f"model.backbone.{key}": value for key, value in encoder.items()}}, tmp_path / "ct.ckpt")
    shipped = read_json(Path(str(resources.files("nnssl_plugin.checkpoints.sources") / "tables" / "ct-fm.json")))
    shipped["network"]["kwargs"] = ARGUMENTS
    write_json(tmp_path / "small.json", shipped)
    instead = {place(words): words for words in section("CT-FM and VoCo")}
    left = finished(root, run_page(root, tmp_path / "ct.ckpt", instead=instead, table=str(tmp_path / "small.json")))
    assert "intensities are normalised differently" in left.printed["nnssl_plugin adapt"]
    assert_fine_tuned(left, {f"encoder.{key}": value for key, value in encoder.items()}, ("encoder.",))
