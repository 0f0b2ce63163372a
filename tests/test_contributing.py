"""CONTRIBUTING.md is right: adding a method touches the files that it names, each is needed, and its example trains."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from pretraining_harness import run
from registry_checks import generator, missing_pieces

import nnssl_plugin.methods
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.registry import METHODS, Method, Paper

NAME = "toy"
COPIED = ("nnssl_plugin", "pretrain_trainers", "plans", "docs", "setup.cfg")
PAGE = """# Toy

> Ada Example. *A toy for tests.*

Our implementation: Apache-2.0.

## The idea
## Command
`nnUNetv2_train 501 3d_fullres all -tr ToyPretrainer`
## Settings
`temperature` `momentum` `queue` `break_from` `break_until`
## What is logged
## Memory and cost
## What differs from the paper, and why
"""
SETTINGS = """from toy_method import Settings as Settings

from nnssl_plugin.pretraining.settings import TrainingSettings

TRAINING = TrainingSettings()
"""
WRITTEN = {
    "nnssl_plugin/methods/toy/__init__.py": '"""A toy."""\n',
    "nnssl_plugin/methods/toy/settings.py": SETTINGS,
    "nnssl_plugin/methods/toy/objective.py": "from toy_method import Toy as Toy\n",
    "nnssl_plugin/methods/toy/trainer.py": "from toy_method import ToyPretrainer as ToyPretrainer\n",
    "pretrain_trainers/toy.py": "from nnssl_plugin.methods.toy.trainer import ToyPretrainer as ToyPretrainer\n",
    "docs/methods/toy.md": PAGE,
    "tests/methods/toy/test_objective.py": "",
}
ENTRY = Method(
    title="Toy",
    summary="a toy",
    trainer="nnssl_plugin.methods.toy.trainer.ToyPretrainer",
    settings="nnssl_plugin.methods.toy.settings.Settings",
    training="nnssl_plugin.methods.toy.settings.TRAINING",
    trains=("encoder",),
    needs="",
    dimensions=(2, 3),
    paper=Paper("A toy for tests.", ("Ada Example",)),
    licence="Apache-2.0",
    docs="docs/methods/toy.md",
    presets={"toy": "every default, written out"},
)
GENERATED = ["README.md", "docs/README.md", "docs/reference/commands.md", "plans/README.md", "CITATION.cff"]


@pytest.fixture
def copy(repository, tmp_path, monkeypatch):
    """A copy of the repository without its tests, whose methods can be imported."""
    for name in COPIED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(source, tmp_path / name)
    for page in repository.glob("*.*"):
        if page.suffix in (".md", ".cff"):
            shutil.copy(page, tmp_path / page.name)
    here = str(tmp_path / "nnssl_plugin" / "methods")
    monkeypatch.setattr(nnssl_plugin.methods, "__path__", [*nnssl_plugin.methods.__path__, here])
    yield tmp_path
    for module in [each for each in sys.modules if each.startswith("nnssl_plugin.methods.toy")]:
        del sys.modules[module]


def add_the_toy(root: Path, *, without: str = "") -> dict[str, Method]:
    """Do by hand what a contributor does, but for one file; returns the registry."""
    from toy_method import Settings

    block = dataclasses.asdict(TrainingSettings())
    del block["sources"]
    preset = {"pretraining": block | {"method_name": NAME, "method": dataclasses.asdict(Settings())}}
    for path, content in (WRITTEN | {"plans/toy.json": json.dumps(preset)}).items():
        if not path.startswith(without or "-"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
    if without != "setup.cfg":
        lines = (root / "setup.cfg").read_text()
        added = lines.replace(
            "    nnssl_plugin.networks\n", "    nnssl_plugin.methods.toy\n    nnssl_plugin.networks\n"
        )
        (root / "setup.cfg").write_text(added)
    methods = METHODS if without == "nnssl_plugin/registry.py" else METHODS | {NAME: ENTRY}
    for path, text in generator(root).generated(root, methods=methods).items():
        if path.relative_to(root).as_posix() != without:
            path.write_text(text)
    return methods


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def named_files(repository: Path) -> list[str]:
    """The files of both tables of the section, for the method ``toy``."""
    section = (repository / "CONTRIBUTING.md").read_text().partition("### What it touches")[2].partition("\n### ")[0]
    return [path.replace("NAME", NAME) for path in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)]


def test_adding_a_toy_method_touches_the_files_that_the_page_names(copy, repository):
    before = contents(copy)
    methods = add_the_toy(copy)
    assert missing_pieces(NAME, copy, methods) == []
    after = contents(copy)
    touched = {path for path in after if after[path] != before.get(path)}
    named = set(named_files(repository))
    by_the_test = {"nnssl_plugin/registry.py", "CHANGELOG.md"}  # handed in, and for people
    folders = {path for path in named if path.endswith("/")}
    assert {path for path in touched if not any(path.startswith(folder) for folder in folders)} | folders | (
        by_the_test
    ) == named
    assert set(GENERATED) <= touched


@pytest.mark.parametrize(
    "without",
    [
        "nnssl_plugin/methods/toy/trainer.py",
        "nnssl_plugin/registry.py",
        "pretrain_trainers/toy.py",
        "setup.cfg",
        "plans/toy.json",
        "docs/methods/toy.md",
        "tests/methods/toy/",
        *GENERATED,
    ],
)
def test_each_of_them_is_missed(copy, repository, without):
    assert any(without.startswith(named) for named in named_files(repository))
    problems = missing_pieces(NAME, copy, add_the_toy(copy, without=without))
    assert len(problems) == 1, problems


def test_the_example_of_a_folder_of_ones_own_trains(repository, tmp_path, nnunet_environment, monkeypatch):
    """The code of the page, found by nnU-Net in a folder on nnUNet_extTrainer, as it stands there."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    (code,) = re.findall(
        r"```python\n(\"\"\"denoising\.py.*?)```", (repository / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "denoising.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", f"{nnunet_environment['nnUNet_extTrainer']}:{tmp_path / 'mine'}")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)
    found = recursive_find_trainer_class_by_name("DenoisingPretrainer")
    steps = {"epochs": 1, "iterations_per_epoch": 2, "validation_iterations": 1, "method": {"noise": 0.1}}
    trainer = run(trainer_class=found, channels=1, pretraining=steps)
    assert np.isfinite(trainer.log.history()["train/restored"]).all()
    assert trainer.method_settings.noise == 0.1 and Path(trainer.output_folder, "checkpoint_final.pth").is_file()
