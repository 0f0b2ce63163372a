"""Files made to run code when they are opened run none, and say what they would have run."""

import builtins
import io
import json
import logging
import os
import pickle
import re
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from nnssl_plugin.checkpoints.format.files import read_checkpoint, read_trusted, unsafe_globals
from nnssl_plugin.checkpoints.sources.inspection import inspect_file
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError


class Calls:
    """Pickles to a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class CallsInItsState:
    """An object of an allowed kind whose state is the call."""

    def __init__(self, function, *arguments):
        self.call = Calls(function, *arguments)

    def __reduce__(self):
        return OrderedDict, (), {"state": self.call}


def payloads(marker: Path) -> dict:
    """What is called → an object that pickles to it, and the name in the file (protocol 2 has Python 2's names)."""
    write = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": (Calls(os.system, f"touch '{marker}'"), "posix.system"),
        "exec": (Calls(builtins.exec, write), "__builtin__.exec"),
        "eval": (Calls(builtins.eval, write), "__builtin__.eval"),
        "open": (Calls(builtins.open, str(marker), "w"), "io.open"),
        "mkdir": (Calls(os.mkdir, str(marker)), "posix.mkdir"),
        "subprocess": (Calls(subprocess.getoutput, f"touch '{marker}'"), "commands.getoutput"),
        "import": (Calls(builtins.__import__, "this"), "__builtin__.__import__"),
        "in a state": (CallsInItsState(os.mkdir, str(marker)), "posix.mkdir"),
    }


NAMES = list(payloads(Path("marker")))


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "code_ran"


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "name, place",
    [
        *((name, "beside") for name in NAMES),
        ("os.system", "wrapper"),
        ("exec", "key's value"),
    ],
)
def test_nothing_is_run(name, new_format, place, tmp_path, marker):
    payload, called = payloads(marker)[name]
    weights = {"a.weight": torch.zeros(2)}
    content = {
        "beside": {"state_dict": weights, "hyper": payload},
        "wrapper": {"state_dict": payload},
        "key's value": {"state_dict": {**weights, "b": payload}},
    }[place]
    file = tmp_path / "crafted.pth"
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    for read in (read_source, inspect_file, read_checkpoint):
        with pytest.raises(UserError, match=re.escape(called)) as refused:
            read(file)
    assert "nnssl_plugin import --trust" in refused.value.remedy
    assert unsafe_globals(file) == [called]
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_of_any_protocol_is_refused_and_listed(protocol, tmp_path, marker):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": Calls(os.mkdir, str(marker))}, protocol))
    with pytest.raises(UserError, match=r"posix\.mkdir"):
        read_source(tmp_path / "a.pkl")
    assert unsafe_globals(tmp_path / "a.pkl") == ["posix.mkdir"] and not marker.exists()


def test_code_in_what_builds_a_tensor_is_not_run(tmp_path, marker):
    """The hooks of ``torch._utils._rebuild_tensor_v2`` hold the call: an allowed function with a foreign argument."""

    class Tensor:
        def __reduce__(self):
            storage = torch.zeros(1).untyped_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1,), (1,), False, {"h": Calls(os.mkdir, str(marker))})

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"state_dict": {"w": Tensor()}}, 2))
    with pytest.raises(UserError):
        read_source(tmp_path / "a.pkl")
    assert "posix.mkdir" in unsafe_globals(tmp_path / "a.pkl") and not marker.exists()


def test_names_put_together_on_the_stack_are_followed(tmp_path):
    """STACK_GLOBAL after harmless strings that are popped again: the listing keeps the machine's own stack."""

    def text(value):
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    decoy = text("collections") + text("OrderedDict") + pickle.POP + pickle.POP
    pickled = (
        pickle.PROTO
        + b"\x04"
        + text("posix")
        + pickle.MEMOIZE
        + pickle.POP
        + pickle.BINGET
        + b"\x00"
        + text("system")
        + decoy
        + pickle.STACK_GLOBAL
        + text("true")
        + pickle.TUPLE1
        + pickle.REDUCE
        + pickle.STOP
    )
    (tmp_path / "a.pkl").write_bytes(pickled)
    assert unsafe_globals(tmp_path / "a.pkl") == ["posix.system"]


def test_a_pickle_cut_off_is_listed_as_unclear(tmp_path):
    pickled = pickle.dumps({"x": Calls(os.mkdir, "never")}, 4)
    (tmp_path / "a.pkl").write_bytes(pickled[:-6])
    names = unsafe_globals(tmp_path / "a.pkl")
    assert "posix.mkdir" in names and len(names) == 2


def test_every_pickle_of_an_archive_is_listed(tmp_path, marker):
    """A harmless data.pkl, and a second one of the same name in other letters, which PyTorch finds as well."""
    file = tmp_path / "a.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, file)
    assert unsafe_globals(file) == []
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/DATA.PKL", pickle.dumps(Calls(os.mkdir, str(marker)), 2))
    assert unsafe_globals(file) == ["posix.mkdir"]


def test_a_pickle_with_an_archive_behind_it_is_read_as_pytorch_reads_it(tmp_path, marker):
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, buffer)
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Calls(os.mkdir, str(marker)), 2) + buffer.getvalue())
    assert zipfile.is_zipfile(tmp_path / "a.pth") and "posix.mkdir" in unsafe_globals(tmp_path / "a.pth")
    with pytest.raises(UserError):
        read_source(tmp_path / "a.pth")
    assert not marker.exists()


def test_a_pickle_named_safetensors_is_refused(tmp_path, marker):
    torch.save({"x": Calls(os.mkdir, str(marker))}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"named \.safetensors but is not"):
        read_source(tmp_path / "a.safetensors")
    assert not marker.exists()


def test_safetensors_with_an_archive_behind_it_are_refused(tmp_path, marker):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    buffer = io.BytesIO()
    torch.save({"x": Calls(os.mkdir, str(marker))}, buffer)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4) + buffer.getvalue())
    with pytest.raises(UserError, match="damaged"):
        read_source(tmp_path / "a.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 200])
def test_a_safetensors_header_of_absurd_length_is_refused(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    with pytest.raises(UserError, match=r"named \.safetensors but is not"):
        read_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
    ],
    ids=["beyond the file", "more than its bytes", "negative", "unknown type"],
)
def test_a_safetensors_tensor_that_is_not_there_is_refused(entry, tmp_path):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="damaged"):
        read_source(tmp_path / "a.safetensors")


def rewritten(file: Path, change, *, compression=zipfile.ZIP_STORED) -> None:
    """The same archive with other pickled instructions."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_tensor_that_claims_a_terabyte_is_refused(new_format, tmp_path):
    four, huge = pickle.BININT1 + b"\x04", pickle.LONG1 + b"\x06" + (2**40).to_bytes(6, "little")
    file = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(4)}, file, _use_new_zipfile_serialization=new_format)
    if new_format:
        rewritten(file, lambda pickled: pickled.replace(four, huge))
    else:
        file.write_bytes(file.read_bytes().replace(four, huge))
    with pytest.raises(UserError, match="damaged"):
        read_source(file)


def test_a_tensor_that_repeats_one_number_a_billion_times_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(30000, 30000), "b": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"claims 3,433 MiB for the tensor w"):
        read_source(tmp_path / "a.pth")


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(10**6)}, file)
    rewritten(file, lambda pickled: pickled, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10**5
    for read in (read_source, read_trusted, unsafe_globals):
        with pytest.raises(UserError, match="claims to unpack to 4 MiB"):
            read(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"{}", b"\x80\x04.", b"hello"])
def test_garbage_is_a_user_error(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    for read in (read_source, read_trusted):
        with pytest.raises(UserError):
            read(tmp_path / "a.pth")


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
def test_the_listing_of_a_truncated_archive_is_a_user_error(part, tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match="truncated"):
        unsafe_globals(tmp_path / "cut.pth")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")  # opening it would wait for a writer
    with pytest.raises(UserError, match="is not a file"):
        read_source(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "dangling.pth").symlink_to("nowhere.pth")
    for name in ("loop.pth", "dangling.pth"):
        with pytest.raises(UserError, match="no checkpoint"):
            read_source(tmp_path / name)


def test_a_scripted_network_is_refused_and_its_state_dict_is_had_by_trusting_it(tmp_path):
    file = tmp_path / "a.pt"
    network = torch.nn.Linear(2, 1)
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 2)), file)
    with pytest.raises(UserError, match="__torch__"):
        read_source(file)
    assert torch.equal(read_trusted(file)["state_dict"]["weight"], network.weight)


def test_a_trusted_file_is_opened_and_what_ran_is_logged(tmp_path, marker, caplog):
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Calls(os.mkdir, str(marker))}, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        content = read_trusted(tmp_path / "a.pth")
    assert marker.is_dir() and torch.equal(content["state_dict"]["a"], torch.ones(2))
    assert "a.pth runs posix.mkdir" in caplog.text


def test_a_trusted_file_without_its_package_says_so(tmp_path):
    pickled = pickle.PROTO + b"\x02" + pickle.GLOBAL + b"absent_package.nets\nNet\n" + pickle.STOP
    (tmp_path / "a.pkl").write_bytes(pickled)
    with pytest.raises(UserError, match=r"absent_package|damaged"):
        read_trusted(tmp_path / "a.pkl")
    assert unsafe_globals(tmp_path / "a.pkl") == ["absent_package.nets.Net"]


def test_a_pickled_network_is_refused_and_its_state_dict_is_had_by_trusting_it(tmp_path):
    network = torch.nn.Linear(2, 1)
    torch.save(network, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_source(tmp_path / "a.pth")
    assert torch.equal(read_trusted(tmp_path / "a.pth")["state_dict"]["bias"], network.bias)


def test_a_file_with_numpy_values_is_not_listed_as_unsafe(tmp_path):
    import numpy as np

    torch.save({"w": torch.ones(1), "logging": [np.float64(1), np.float32(2), np.arange(3)]}, tmp_path / "a.pth")
    assert unsafe_globals(tmp_path / "a.pth") == []


def test_the_listing_agrees_with_pytorchs_own(tmp_path, marker):
    torch.save({"a": torch.zeros(1), "b": Calls(os.mkdir, str(marker)), "c": Path("x")}, tmp_path / "a.pth")
    expected = torch.serialization.get_unsafe_globals_in_checkpoint(str(tmp_path / "a.pth"))
    assert unsafe_globals(tmp_path / "a.pth") == sorted(expected)
