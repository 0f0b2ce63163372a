"""The verb clip: from a captioned dataset to a fine-tuned pair and the embeddings that it makes."""

import nibabel
import numpy as np
import open_clip
import pytest
import torch

from nnssl_plugin.cli.main import main
from nnssl_plugin.data.triplets import Triplet, load_embeddings, read_embeddings, read_triplets, write_triplets
from nnssl_plugin.io.files import write_json

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 16, "vocab_size": 49408},
}


@pytest.fixture
def folder(nnunet_environment, tmp_path):
    path = tmp_path / "nnUNet_raw" / "Dataset077_Cli"
    (path / "imagesTr").mkdir(parents=True)
    write_json(path / "dataset.json", {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz"})
    for number in range(12):
        array = np.random.default_rng(number).uniform(size=(8, 9, 10)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path / "imagesTr" / f"c{number:02d}_0000.nii.gz")
    write_triplets(path, [Triplet(f"c{n:02d}", "axial", 4, 10, f"Slice number {n}.", "me") for n in range(12)])
    return path


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of weights, and its architecture known to open_clip as ``tiny-test``."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS, "tiny-test": TINY})
    torch.save(open_clip.CLIP(**TINY).state_dict(), tmp_path / "tiny.pt")
    return str(tmp_path / "tiny.pt")


@pytest.mark.slow
def test_pair_is_trained_measured_and_embeds_then_serves_caption(folder, weights, capsys):
    arguments = ["--model", "tiny-test", "--weights", weights, "--epochs", "2", "--lr", "1e-3", "--batch-size", "5"]
    assert main(["clip", "-d", "77", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "chance" in printed and "slice → text R@1" in printed
    assert "trained on 10 pairs, 2 held out" in printed and "12 embedded, 0 reused" in printed
    assert "Made by clip_pair sha256:" in printed and "trained on slices and texts from tiny-test" in printed
    triplets = read_triplets(folder)
    before = read_embeddings(folder, triplets)
    assert main(["clip", "-d", "77", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "trained before with these settings" in printed and "0 embedded, 12 reused" in printed
    assert main(["caption", "-d", "77", "--weights", str(folder / "clip_pair")]) == 0
    assert "0 embedded, 12 reused" in capsys.readouterr().out
    after = read_embeddings(folder, triplets)
    assert all(np.array_equal(after[key][0], image) for key, (image, _) in before.items())
    assert main(["caption", "-d", "77"]) == 2
    assert f"--weights {folder / 'clip_pair'}" in capsys.readouterr().err


@pytest.mark.slow
def test_without_weights_a_small_pair_is_trained_and_says_what_that_means(folder, capsys, caplog):
    assert main(["clip", "-d", "77", "--epochs", "1"]) == 0
    assert "no medical knowledge from outside" in caplog.text and "Only 2 cases are held out" in caplog.text
    assert load_embeddings(folder).weights.startswith("clip_pair sha256:")
    assert "held-out retrieval" in capsys.readouterr().out


def test_mistakes_name_their_remedy(folder, capsys):
    (folder / "triplets.jsonl").rename(folder / "away")
    assert main(["clip", "-d", "77"]) == 2
    assert "nnssl_plugin caption -d 077" in capsys.readouterr().err
    assert main(["clip", "-d", "78"]) == 2
    assert "no single dataset 78" in capsys.readouterr().err
    assert main(["clip", "-d", "77", "--batch-size", "1"]) == 2
    assert "batch_size 1" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["clip", "--help"])
    assert "nnssl_plugin clip -d 501" in capsys.readouterr().out
