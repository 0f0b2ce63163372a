"""Checkpoints: plain types on disk, and no code run on reading."""

import os
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint, to_plain
from nnssl_plugin.errors import UserError


def test_what_is_saved_reads_back_with_weights_only_true(tmp_path):
    content = {
        "scalar": np.float64(0.5),
        "flag": np.bool_(True),
        "keys": {np.int64(3): Path("a/b")},
        "none": None,
        "pair": (1, np.float32(2)),
        "big_endian": np.arange(3, dtype=">i4"),
        "texts": np.array(["a", "b"]),
        "weights": OrderedDict(w=nn.Parameter(torch.ones(2, 2))),
        "device": torch.device("cuda:0"),
        "huge": 2**130,
    }
    save_checkpoint(content, tmp_path / "file.pth")
    read = torch.load(tmp_path / "file.pth", weights_only=True)
    assert type(read["scalar"]) is float and read["flag"] is True and read["keys"] == {3: "a/b"}
    assert read["pair"] == (1, 2.0) and read["texts"] == ["a", "b"] and read["huge"] == 2**130
    assert torch.equal(read["big_endian"], torch.tensor([0, 1, 2], dtype=torch.int32))
    assert type(read["weights"]["w"]) is torch.Tensor and not read["weights"]["w"].requires_grad


def test_optimizer_states_survive(tmp_path):
    parameter = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    save_checkpoint({"optimizer_state": optimizer.state_dict()}, tmp_path / "file.pth")
    other = torch.optim.AdamW([nn.Parameter(torch.randn(3))])
    other.load_state_dict(read_checkpoint(tmp_path / "file.pth")["optimizer_state"])
    assert torch.equal(next(iter(other.state.values()))["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_shared_tensors_are_stored_once_and_slices_without_the_rest(tmp_path):
    weight = torch.randn(1000)
    save_checkpoint({"a": weight, "b": weight}, tmp_path / "shared.pth")
    save_checkpoint({"a": torch.randn(100_000)[:1000]}, tmp_path / "slice.pth")
    assert (tmp_path / "shared.pth").stat().st_size < 2 * 4 * 1000
    assert (tmp_path / "slice.pth").stat().st_size < 2 * 4 * 1000


def test_named_tuples_become_tuples():
    assert to_plain(namedtuple("Point", "x y")(1, np.int8(2))) == (1, 2)


@pytest.mark.parametrize("value", [nn.Linear(1, 1), object(), len, np.datetime64("2020"), torch.eye(2).to_sparse()])
def test_what_only_code_could_read_back_is_refused_with_its_place(value, tmp_path):
    with pytest.raises(TypeError, match=r"content\['ssl_state'\]\['queue'\]\[1\]"):
        save_checkpoint({"ssl_state": {"queue": [0, value]}}, tmp_path / "file.pth")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint({"step": 1}, tmp_path / "file.pth")
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"step": 2}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.pth"]


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, new_format):
    torch.save(
        {"network_weights": Malicious(tmp_path / "ran")},
        tmp_path / "bad.pth",
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(UserError, match=r"bad\.pth would run code .*mkdir"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_bare_pickle_is_not_run(tmp_path):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_a_stock_checkpoint_with_numpy_in_its_log_is_read(tmp_path):
    log = {
        "mean_fg_dice": [np.float64(0.5), np.float32(0.25)],
        "dice_per_class_or_region": [[np.float32(0.1)]],
        "history": np.arange(3.0),
        "steps": [np.int64(3)],
        "done": np.bool_(False),
    }
    torch.save(
        {
            "network_weights": {"w": torch.ones(2)},
            "logging": log,
            "_best_ema": np.float64(0.3),
            "init_args": {"device": torch.device("cpu"), "fold": 0},
        },
        tmp_path / "stock.pth",
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "stock.pth", weights_only=True)
    read = read_checkpoint(tmp_path / "stock.pth")
    assert read["logging"]["mean_fg_dice"] == [0.5, 0.25] and read["_best_ema"] == 0.3
    assert np.array_equal(read["logging"]["history"], [0, 1, 2])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*missing\.pth"):
        read_checkpoint(tmp_path / "missing.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_format", [True, False])
def test_truncation_anywhere_is_a_user_error(tmp_path, new_format):
    whole = tmp_path / "whole.pth"
    torch.save({"w": torch.ones(3), "x": np.float32(3)}, whole, _use_new_zipfile_serialization=new_format)
    content = whole.read_bytes()
    for length in range(0, len(content), 3):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.pth (is truncated|would run code)"):
            read_checkpoint(tmp_path / "cut.pth")


def test_something_else_than_a_checkpoint_is_named(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match=r"holds a Tensor, not a checkpoint"):
        read_checkpoint(tmp_path / "tensor.pth")
