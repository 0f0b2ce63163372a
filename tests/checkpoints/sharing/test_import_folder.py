"""Shared weights come back bit for bit, or not at all; pickles run nothing unless trusted."""

import argparse
import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from pretraining_harness import assert_same, make_trainer
from safetensors.torch import load_file, save_file
from small_pretraining import pretrain_one_step

from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.format.provenance import weights_hash
from nnssl_plugin.checkpoints.format.shared_folder import read_shared_folder
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.checkpoints.sharing.importing import import_weights
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

SAME = (
    "network_weights",
    "ssl_state",
    "provenance",
    "nnssl_adaptation_plan",
    "citations",
    "trainer_name",
    "current_epoch",
    "inference_allowed_mirroring_axes",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrain_one_step(tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("export") / "shared").folder


@pytest.fixture
def shared(exported, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "shared"))


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory) -> Path:
    return import_weights(exported, tmp_path_factory.mktemp("import") / "pretrained.pth")


def test_it_comes_back_bit_for_bit(checkpoint, imported):
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, imported))
    for key in SAME:
        assert_same(before[key], after[key], key)
    assert weights_hash(after["network_weights"]) == before["provenance"]["weights_sha256"]
    assert after["init_args"]["plans"] == before["init_args"]["plans"]


def test_keys_of_one_memory_share_it_again(imported):
    content = torch.load(imported, weights_only=True)
    keys = [
        f"{place}.stages.0.0.convs.0.{name}.weight"
        for place in ("encoder", "decoder.encoder")
        for name in ("conv", "all_modules.0")
    ]
    assert len({content["network_weights"][key].data_ptr() for key in keys}) == 1
    teacher = [value for key, value in content["ssl_state"]["task"].items() if key.startswith("teacher.")]
    assert len({value.data_ptr() for value in teacher}) < len(teacher)


def test_exporting_again_gives_the_same_files(exported, imported, tmp_path):
    again = export_checkpoint(imported, tmp_path / "again").folder
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in exported.iterdir()}


def test_adapt_and_stock_nnunet_read_it(imported, nnunet_environment):
    write_fake_dataset(cases=1, channels=2)
    report = adapt_checkpoint("901", name="shared", weights=imported).report
    assert report.coverage("encoder") == 1.0
    dataset_json = read_json(Path(os.environ["nnUNet_preprocessed"], NAME, "dataset.json"))
    load_pretrained_weights(build_network(fake_plan(), "3d_fullres", dataset_json), str(imported))


def test_the_folder_itself_is_a_source(exported, checkpoint):
    source = read_source(exported)
    assert source.kind == "nnssl_plugin" and source.configuration == "3d_fullres"
    assert weights_hash(source.weights) == weights_hash(read_checkpoint(checkpoint)["network_weights"])


def test_a_pretraining_cannot_be_resumed_without_its_optimiser(imported, nnunet_environment):
    trainer = make_trainer(cases=2)
    with pytest.raises(UserError, match="leaves the optimiser out"):
        trainer.load_checkpoint(str(imported))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "aliases.json",
        "plans.json",
        "dataset.json",
        "provenance.json",
        "ssl_state.safetensors",
        "ssl_state.json",
        "checkpoint.json",
    ],
)
def test_a_changed_or_missing_file_is_named(shared, name, tmp_path):
    content = bytearray((shared / name).read_bytes())
    content[-3] ^= 1
    (shared / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not the file that was exported"):
        import_weights(shared, tmp_path / "x.pth")
    (shared / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        import_weights(shared, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_other_weights_are_noticed_even_with_new_hashes_of_their_file(shared):
    tensors = load_file(shared / "model.safetensors")
    tensors[next(iter(tensors))] += 1
    save_file(tensors, shared / "model.safetensors")
    hashes = read_json(shared / "hashes.json")
    hashes["files"]["model.safetensors"] = hashlib.sha256((shared / "model.safetensors").read_bytes()).hexdigest()
    write_json(shared / "hashes.json", hashes)
    with pytest.raises(UserError, match="not those that were exported"):
        read_shared_folder(shared)


def test_a_card_that_was_filled_in_is_only_mentioned(shared, caplog):
    (shared / "README.md").write_text("filled in")
    with caplog.at_level(logging.WARNING):
        read_shared_folder(shared)
    assert "README.md was edited" in caplog.text


@pytest.mark.parametrize("hashes", [{}, [], {"files": {}}, {"files": {"model.safetensors": "0"}}, {"files": 3}])
def test_a_folder_that_is_laid_out_otherwise_is_refused(shared, hashes):
    write_json(shared / "hashes.json", hashes)
    with pytest.raises(UserError):
        read_shared_folder(shared)


def test_a_file_outside_the_folder_is_never_looked_at(shared):
    hashes = read_json(shared / "hashes.json")
    hashes["files"]["../outside"] = "0"
    write_json(shared / "hashes.json", hashes)
    (shared.parent / "outside").write_text("x")
    with pytest.raises(UserError, match="outside is missing"):
        read_shared_folder(shared)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no hashes\.json"):
        read_shared_folder(tmp_path)


def test_a_checkpoint_that_is_there_is_kept(exported, tmp_path):
    (tmp_path / "mine.pth").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        import_weights(exported, tmp_path / "mine.pth")


class Calls:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing_and_says_what_it_would_run(tmp_path):
    torch.save({"network_weights": {"w": torch.ones(2)}, "x": Calls(tmp_path / "ran")}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"(posix|nt)\.mkdir") as error:
        import_weights(tmp_path / "foreign.pth", tmp_path / "plain.pth")
    assert "import --trust" in error.value.remedy
    assert not (tmp_path / "ran").exists() and not (tmp_path / "plain.pth").exists()


def test_a_trusted_pickle_becomes_a_plain_checkpoint(tmp_path, caplog):
    content = {
        "network_weights": {"w": torch.ones(2)},
        "arguments": argparse.Namespace(lr=1),
        "epoch": 3,
        "model": torch.nn.Linear(2, 1),
        "x": Calls(tmp_path / "ran"),
    }
    torch.save(content, tmp_path / "foreign.pth")
    with caplog.at_level(logging.WARNING):
        import_weights(tmp_path / "foreign.pth", tmp_path / "plain.pth", trust=True)
    plain = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert (tmp_path / "ran").exists()
    assert torch.equal(plain["network_weights"]["w"], torch.ones(2)) and plain["epoch"] == 3
    assert set(plain["model"]) == {"weight", "bias"} and "arguments" not in plain
    assert "mkdir" in caplog.text and "Left out 'arguments'" in caplog.text


def test_bare_weights_go_where_nnunet_looks_for_them(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    save_file(weights, tmp_path / "x.safetensors")
    torch.save(weights, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        path = import_weights(tmp_path / name, tmp_path / f"from_{name}.pth")
        assert_same(dict(sorted(torch.load(path, weights_only=True)["network_weights"].items())), weights)
