"""The verb caption: from a prepared dataset to texts and embeddings, and again."""

import nibabel
import numpy as np
import pytest

from nnssl_plugin.cli.main import main
from nnssl_plugin.data.triplets import read_embeddings, read_triplets
from nnssl_plugin.intake.unlabelled import prepare_dataset


@pytest.fixture
def folder(nnunet_environment, tmp_path):
    (tmp_path / "in").mkdir()
    for seed in range(2):
        array = np.random.default_rng(seed).uniform(size=(8, 9, 10)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "in" / f"c{seed}.nii.gz")
    return prepare_dataset(tmp_path / "in", 77, "Cli", processes=1).folder


@pytest.mark.slow
def test_texts_and_embeddings_are_written_then_kept(folder, capsys):
    arguments = ["--captioner", "template", "--set", "size=false", "--body-part", "left knee", "--seed", "3"]
    assert main(["caption", "-d", "77", "--slices", "3", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "6 texts written, 0 kept" in printed and "6 embedded, 0 reused" in printed
    assert "random encoders" in printed and "know nothing of what they show" in printed
    triplets = read_triplets(folder)
    assert all("MR slice of the left knee" in triplet.text and "mm" not in triplet.text for triplet in triplets)
    assert len(read_embeddings(folder, triplets)) == 6
    assert main(["caption", "-d", folder.name, "--slices", "3", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "0 texts written, 6 kept" in printed and "0 embedded, 6 reused" in printed


def test_captioners_and_options_that_are_mistaken_are_named(folder, capsys):
    for arguments, said in (
        (["--captioner", "oracle"], "There is no captioner oracle"),
        (["--set", "size"], "an option reads KEY=VALUE"),
        (["--set", "colour=1"], "Unknown setting 'colour'"),
    ):
        assert main(["caption", "-d", "77", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (folder / "triplets.jsonl").exists()


def test_unknown_dataset_and_weights_are_mistakes(folder, capsys):
    assert main(["caption", "-d", "78"]) == 2
    assert "no single dataset 78" in capsys.readouterr().err
    assert main(["caption", "-d", "77", "--weights", "nowhere.pt", "--model", "ViT-B-32"]) == 2
    error = capsys.readouterr().err
    assert "neither a file, nor a folder, nor a tag" in error and len(error.splitlines()) <= 10


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["caption", "--help"])
    assert "nnssl_plugin caption -d 501" in capsys.readouterr().out
