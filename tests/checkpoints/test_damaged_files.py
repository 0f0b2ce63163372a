"""Checkpoints with one field of another type or an absurd value: every command succeeds or refuses in words."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import WRITERS, bad_values, nested, own_checkpoint, places, with_value
from fake_dataset import write_fake_dataset

from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.adaptation.like import plan_like
from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.checkpoints.sharing.importing import import_weights
from nnssl_plugin.checkpoints.sources.inspection import inspect_file, screen
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json

names = map("x{}".format, itertools.count())
COMMANDS = {
    "inspect": lambda file: screen(inspect_file(file)),
    "adapt": lambda file: adapt_checkpoint("901", name=next(names), weights=file),
    "plan": lambda file: plan_like(
        "901", read_source(file), name=next(names), spacing=True, normalisation=True, orientation=True
    ),
    "export": lambda file: export_checkpoint(file, file.parent / next(names)),
    "import": lambda file: import_weights(file, file.parent / f"{next(names)}.pth"),
}
FIELDS = 12
"""Of a checkpoint that the quick test damages, for each command and writer."""


@pytest.fixture
def dataset(nnunet_environment):
    write_fake_dataset(cases=1)


def succeeds_or_refuses(command, content, file):
    torch.save(content, file)
    try:
        COMMANDS[command](file)
    except UserError as error:
        assert error.problem and error.remedy


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_field_is_no_traceback(command, writer, dataset, tmp_path):
    content, values = WRITERS[writer](), bad_values()
    fields = list(places(content))
    first = list(COMMANDS).index(command)  # every command meets other fields and values
    for number, place in enumerate(fields[first :: max(1, len(fields) // FIELDS)]):
        value = values[(5 * number + first) % len(values)]
        succeeds_or_refuses(command, with_value(content, place, value), tmp_path / "a.pth")


@pytest.mark.nightly
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_damaged_field_is_a_traceback(command, writer, dataset, tmp_path):
    content, values = WRITERS[writer](), bad_values()
    for number, place in enumerate(places(content)):
        for value in values[number % 6 :: 6]:
            succeeds_or_refuses(command, with_value(content, place, value), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without its values"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    ],
    ids=["sparse", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_plain_values_are_named(tensor, said, tmp_path):
    content = own_checkpoint()
    key = next(iter(content["network_weights"]))
    torch.save(with_value(content, ("network_weights", key), tensor), tmp_path / "a.pth")
    for command in ("inspect", "export", "import"):
        with pytest.raises(UserError, match=said) as error:
            COMMANDS[command](tmp_path / "a.pth")
        assert key in error.value.problem


def test_blocks_within_themselves_and_without_end_are_refused(tmp_path):
    circle: dict = {}
    circle["a"] = circle
    doubled: list = [0]
    for _ in range(40):  # 2 ** 40 values
        doubled = [doubled, doubled]
    for number, value in enumerate(
        (circle, doubled, nested(70), {"shallow": (deep := nested(40)), "x": [[[[deep]]]] * 3})
    ):
        torch.save({"network_weights": {"w": torch.ones(2)}, "more": value}, tmp_path / "a.pth")
        if number < 3:
            with pytest.raises(UserError, match=r"nested more than|more than 10,000,000 values"):
                read_checkpoint(tmp_path / "a.pth")
        else:
            assert read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": ', "\xff\xfe", "[]", "3"])
@pytest.mark.parametrize("file", ["hashes.json", "provenance.json", "aliases.json", "plans.json"])
def test_json_of_a_shared_folder_that_is_damaged_is_named(file, text, tmp_path):
    torch.save(own_checkpoint(), tmp_path / "own.pth")
    folder = export_checkpoint(tmp_path / "own.pth", tmp_path / "shared").folder
    (folder / file).write_bytes(text.encode("latin-1"))
    if file != "hashes.json":  # as someone would who damages it on purpose
        from nnssl_plugin.checkpoints.format.shared_folder import file_hash

        hashes = read_json(folder / "hashes.json")
        write_json(folder / "hashes.json", hashes | {"files": hashes["files"] | {file: file_hash(folder / file)}})
    with pytest.raises(UserError):
        read_source(folder)
    with pytest.raises(UserError):
        import_weights(folder, tmp_path / "x.pth")


@pytest.mark.parametrize("place", range(12))
def test_damaged_safetensors_are_refused(place, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(4, 4), "b": torch.zeros(4)}, tmp_path / "a.safetensors")
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[8 + 9 * place : 8 + 9 * place + 3] = b'{"9'
    (tmp_path / "a.safetensors").write_bytes(content)
    for read in (read_source, inspect_file):
        try:
            assert read(tmp_path / "a.safetensors")  # where the damage is in a name
        except UserError as error:
            assert "a.safetensors" in error.problem


def test_what_a_file_says_cannot_move_the_cursor(tmp_path):
    evil = "\x1b[2J\x1b]0;owned\x07\u202etxt\x9b31m"
    content = own_checkpoint()
    content["provenance"] |= {"method": evil, "licence": evil, "citations": [f"A {evil}\nB"]}
    content["network_weights"] = {f"{evil}{key}": value for key, value in content["network_weights"].items()}
    torch.save(content, tmp_path / "a.pth")
    text = screen(inspect_file(tmp_path / "a.pth"))
    assert "\\x1b[2J" in text
    assert not any((ord(char) < 32 and char != "\n") or char in "\x7f\x9b\u202e" for char in text)


def test_no_gpu_and_damage_are_told_apart(tmp_path):
    torch.save({"network_weights": {"a": torch.zeros(2)}}, tmp_path / "a.pth")
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match="no usable GPU") as error:
        read_checkpoint(tmp_path / "a.pth", device=device)
    assert "damaged" not in str(error.value) and "-device cpu" in error.value.remedy
    Path(tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "a.pth")
    assert os.path.exists(tmp_path / "a.pth")
