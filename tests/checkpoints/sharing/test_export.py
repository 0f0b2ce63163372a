"""Exported folders: what they hold, what they never hold, and that they appear whole or not at all."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from fake_dataset import fake_plan
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from safetensors.torch import load_file, save_file
from small_pretraining import pretrain_one_step

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import weights_hash
from nnssl_plugin.checkpoints.format.shared_folder import TensorStore, decode, encode, new_folder
from nnssl_plugin.checkpoints.sharing import export
from nnssl_plugin.checkpoints.sharing.export import LOCAL_PATH, export_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.plans import build_network

SHARED = {
    "model.safetensors",
    "aliases.json",
    "ssl_state.safetensors",
    "ssl_state.json",
    "plans.json",
    "dataset.json",
    "provenance.json",
    "adaptation_plan.json",
    "checkpoint.json",
    "README.md",
    "hashes.json",
}
TWO_CHANNELS = {"channel_names": {"0": "MR", "1": "MR"}, "labels": {"background": 0, "body": 1}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrain_one_step(tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("export") / "shared").folder


def changed(checkpoint: Path, path: Path, change) -> Path:
    content = read_checkpoint(checkpoint)
    change(content)
    save_checkpoint(content, path)
    return path


def test_the_folder_holds_what_it_should(shared):
    assert {path.name for path in shared.iterdir()} == SHARED
    assert len({path.stat().st_mode for path in shared.iterdir()}) == 1, "whoever may read one may read all"
    assert read_json(shared / "plans.json")["pretraining"]["epochs"] == 1
    assert read_json(shared / "dataset.json")["channel_names"] == {"0": "MR", "1": "MR"}
    assert read_json(shared / "provenance.json")["method"] == "toy"


def test_each_memory_is_stored_once_and_every_key_has_its_values(checkpoint, shared):
    weights = torch.load(checkpoint, weights_only=True)["network_weights"]
    with pytest.raises(RuntimeError, match="share memory"):  # why there is an alias table
        save_file(weights, shared.parent / "refused.safetensors")
    stored, aliases = load_file(shared / "model.safetensors"), read_json(shared / "aliases.json")
    assert len(stored) == len({value.data_ptr() for value in weights.values()}) < len(weights)
    assert list(aliases) == list(weights)
    assert all(torch.equal(stored[aliases[key]], value) for key, value in weights.items())


def test_hashes_are_sha256_of_every_file_and_of_the_weights(checkpoint, shared):
    hashes = read_json(shared / "hashes.json")
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shared.iterdir()}
    expected.pop("hashes.json")
    assert hashes["files"] == expected
    weights = torch.load(checkpoint, weights_only=True)["network_weights"]
    assert hashes["network_weights"] == weights_hash(weights) == read_json(shared / "provenance.json")["weights_sha256"]


def test_the_optimiser_and_the_log_stay_behind(checkpoint, shared):
    assert "optimizer_state" in read_checkpoint(checkpoint)
    everything = b"".join(path.read_bytes() for path in shared.iterdir())
    assert b"optimizer" not in everything and b"logging" not in everything
    health = json.loads((shared / "checkpoint.json").read_text())["health"]
    assert all(isinstance(value, float) for value in health.values())  # the last number of a series, not the series


def test_nothing_names_a_case_or_a_place_on_this_machine(checkpoint, tmp_path):
    def plant(content):
        arguments = content["init_args"]
        arguments["dataset_json"] |= {
            "dataset": {"Doe_Jane": {"images": ["/srv/patients/Doe_Jane_0000.nii.gz"], "label": "/srv/l.nii.gz"}},
            "description": "scans of Doe_Jane",
        }
        arguments["plans"]["pretraining"]["weights"] = "/home/someone/old/checkpoint.pth"
        arguments["output_folder"] = "/home/someone/results"
        content["logging"] = {"cases": ["Doe_Jane"]}
        content["provenance"]["settings"]["table"] = {"/mnt/share/Doe_Jane.csv": 1, "file": "C:\\scans\\Doe_Jane.nii"}
        content["provenance"]["training"]["note"] = "read from file:///srv/patients, then ~/scans"
        content["ssl_state"]["origin"] = ["/srv/patients/Doe_Jane"]

    planted = changed(checkpoint, tmp_path / "planted.pth", plant)
    exported = export_checkpoint(planted, tmp_path / "shared")
    everything = b"".join(path.read_bytes() for path in exported.folder.iterdir())
    for secret in (b"Doe_Jane", b"/srv", b"/home", b"/mnt", b"scans\\", b"~/", str(tmp_path).encode()):
        assert secret not in everything, secret
    assert "weights" not in read_json(exported.folder / "plans.json")["pretraining"]
    assert set(exported.removed) == {
        "init_args.plans.pretraining.weights",
        "a key of provenance.settings.table",
        "provenance.settings.table.file",
        "provenance.training.note",
        "ssl_state.origin[0]",
    }


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("/home/a/b.pth", True),
        ("~/x", True),
        ("C:\\data", True),
        ("d:/data", True),
        ("\\\\server\\share", True),
        ("file:///x", True),
        ("see (/data/x)", True),
        ("~user/x", True),
        ("https://doi.org/10.1038/s41592", False),
        ("MR / CT", False),
        ("and/or", False),
        ("3d_fullres", False),
        ("torch.nn.Conv3d", False),
        ("CC-BY-4.0", False),
        ("s3://bucket/key", False),
        ("a:b", False),
        ("1/2 mm", False),
    ],
)
def test_local_paths_are_told_from_other_texts(text, local):
    assert bool(LOCAL_PATH.search(text)) == local


def test_an_interrupted_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "write_hashes", full)
    with pytest.raises(OSError, match="No space"):
        export_checkpoint(checkpoint, tmp_path / "shared")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(checkpoint, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "x").write_text("x")
    assert (tmp_path / "empty" / "x").is_file()


def test_the_nnunet_layout_loads_with_stock_nnunet(checkpoint, tmp_path):
    folder = export_checkpoint(checkpoint, tmp_path / "nnunet", layout="nnunet").folder
    assert {path.name for path in folder.iterdir()} == {
        "pretrained_weights.pth",
        "plans.json",
        "README.md",
        "hashes.json",
    }
    network = build_network(fake_plan(), "3d_fullres", TWO_CHANNELS)
    load_pretrained_weights(network, str(folder / "pretrained_weights.pth"))
    weights = torch.load(checkpoint, weights_only=True)["network_weights"]
    loaded = {key: value for key, value in network.state_dict().items() if ".seg_layers." not in key}
    assert loaded and all(torch.equal(value, weights[key]) for key, value in loaded.items())


def test_the_nnssl_layout_is_that_of_a_repository_of_theirs(checkpoint, tmp_path):
    folder = export_checkpoint(checkpoint, tmp_path / "nnssl", layout="nnssl").folder
    assert {"checkpoint_final.pth", "adaptation_plan.json", "config.json"} <= {path.name for path in folder.iterdir()}
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    plan = read_json(folder / "adaptation_plan.json")
    assert plan == content["nnssl_adaptation_plan"] | {"trainer_name": "ToyPretrainer"}
    assert content["citations"] == [{"type": "Pretraining", "name": "toy", "apa_citations": ["A toy."]}]
    assert "optimizer_state" not in content and "init_args" not in content


def test_the_licence_can_be_said_when_exporting(checkpoint, tmp_path):
    folder = export_checkpoint(checkpoint, tmp_path / "shared", licence="CC-BY-4.0").folder
    assert read_json(folder / "provenance.json")["licence"] == "CC-BY-4.0"
    assert "license: cc-by-4.0" in (folder / "README.md").read_text()


def test_what_is_no_pretraining_is_refused(checkpoint, tmp_path):
    plain = tmp_path / "plain.pth"
    save_checkpoint({"network_weights": read_checkpoint(checkpoint)["network_weights"]}, plain)
    with pytest.raises(UserError, match="not the checkpoint of a pretraining") as error:
        export_checkpoint(plain, tmp_path / "shared")
    assert "--stock" in error.value.remedy and not (tmp_path / "shared").exists()


def test_weights_other_than_the_provenance_says_are_refused(checkpoint, tmp_path):
    def edit(content):
        content["network_weights"]["encoder.stages.0.0.convs.0.conv.bias"].add_(1)

    with pytest.raises(UserError, match="hash differs"):
        export_checkpoint(changed(checkpoint, tmp_path / "edited.pth", edit), tmp_path / "shared")


def test_tensors_of_every_kind_come_back(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "whole": base,
        "alias": base,
        "view": base.view(6, 4),
        "slice": base[1:3],
        "transposed": base.t(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "other_empty": torch.zeros(0, 2),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
    }
    store = TensorStore()
    names = {key: store.add(key, value) for key, value in tensors.items()}
    store.save(tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    assert names["alias"] == "whole" and len(stored) == len(tensors) - 1
    for key, value in tensors.items():
        assert stored[names[key]].dtype == value.dtype and torch.equal(stored[names[key]], value), key


def test_names_that_coincide_do_not_overwrite_each_other():
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    store = TensorStore()
    back = decode(json.loads(json.dumps(encode(state, store, "state"))), store.tensors)
    assert back["a.b"] == 0 and back["a"]["b"] == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        float("inf"),
        "text",
        [1, [2, "x"]],
        (1, (2,), [3]),
        {"a": {"b": ()}},
        {1: "x", (2, 3): None},
        {"__tuple__": 1},
        {"__tensor__": "x"},
        {},
    ],
)
def test_plain_values_come_back_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value, TensorStore(), "x"))), {})
    assert back == value and type(back) is type(value)


def test_a_value_that_cannot_be_held_is_named():
    with pytest.raises(TypeError, match=r"state\.a\.0 is a set"):
        encode({"a": [{1}]}, TensorStore(), "state")
