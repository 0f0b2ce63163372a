"""Everything that an entry of the registry names exists, and agrees with the code."""

import dataclasses
import json
import re

import pytest
from registry_checks import as_in_json, located, missing_pieces, task_class

from nnssl_plugin.cli.main import main
from nnssl_plugin.cli.methods import table
from nnssl_plugin.io.files import read_json
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.registry import METHODS, NETWORKS, TASKS
from nnssl_plugin.settings import settings_from

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_nothing_is_missing(name, repository):
    assert missing_pieces(name, repository) == []


def test_every_folder_of_methods_has_its_entry(repository):
    trainers = (repository / "nnssl_plugin" / "methods").rglob("trainer.py")
    packages = {".".join(path.parent.relative_to(repository).parts) for path in trainers}
    own = {task.trainer.rsplit(".", 2)[0] for task in TASKS.values()}
    assert packages == {method.package for method in METHODS.values()} | {name for name in own if ".methods." in name}


@pytest.mark.parametrize("name", METHODS)
def test_fine_tuning_of_its_own_is_a_task(name):
    assert METHODS[name].finetuning in TASKS


@pytest.mark.parametrize("entry", [*METHODS.values(), *TASKS.values()], ids=lambda entry: entry.trainer_name)
def test_the_trainer_is_found_by_nnunet_and_is_the_installed_class(entry):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    assert recursive_find_trainer_class_by_name(entry.trainer_name) is located(entry.trainer)


@every_method
def test_settings_are_frozen_dataclasses(name):
    settings = located(METHODS[name].settings)
    assert dataclasses.is_dataclass(settings) and settings.__dataclass_params__.frozen
    assert isinstance(located(METHODS[name].training), TrainingSettings)


@every_method
def test_what_the_entry_says_is_what_the_task_does(name):
    method, task, trainer = METHODS[name], task_class(name), located(METHODS[name].trainer)
    assert tuple(task.trained_parts) == method.trains
    assert tuple(sorted(task.needs.dimensions)) == method.dimensions
    assert bool(task.needs.triplets) == ("texts" in method.needs)
    assert trainer.method == name and isinstance(trainer.method_defaults, located(method.settings))
    assert trainer.training_defaults == located(method.training)


def test_alignments_are_functions():
    assert [name for name, method in METHODS.items() if method.alignment and callable(located(method.alignment))] == [
        "med3dinsight"
    ]


@every_method
def test_the_checkpoint_cites_the_paper_of_the_registry(name):
    method, citations = METHODS[name], " ".join(located(METHODS[name].trainer).citations)
    assert method.paper.title in citations and method.title in citations
    assert all(author.split()[-1] in citations for author in method.paper.authors)


@every_method
def test_presets_hold_settings_that_the_method_takes(name, repository):
    settings, training = located(METHODS[name].settings), located(METHODS[name].training)
    for preset in METHODS[name].presets:
        content = read_json(repository / "plans" / f"{preset}.json")
        assert set(content) == {"pretraining"}, preset
        block = dict(content["pretraining"])
        method = block.pop("method")
        assert block.pop("method_name") == name
        read = settings_from(method, settings(), where=preset)
        assert as_in_json({key: getattr(read, key) for key in method}) == method
        read = settings_from(block, training, where=preset)
        assert as_in_json({key: getattr(read, key) for key in block}) == block


@every_method
def test_the_recommended_preset_states_the_defaults(name, repository):
    method = METHODS[name]
    block = read_json(repository / "plans" / f"{next(iter(method.presets))}.json")["pretraining"]
    assert block.pop("method_name") == name
    assert block.pop("method") == as_in_json(dataclasses.asdict(located(method.settings)()))
    training = as_in_json(dataclasses.asdict(located(method.training)))
    assert block == {key: value for key, value in training.items() if key in block}


@every_method
def test_the_paper_is_cited_once(name, repository):
    citation = re.sub(r"\s+", " ", (repository / "CITATION.cff").read_text())
    assert citation.count(METHODS[name].paper.title) == 1


def test_networks_are_those_that_can_be_read(repository):
    source = "".join(path.read_text() for path in (repository / "nnssl_plugin" / "networks").rglob("*.py"))
    assert [network for network in NETWORKS if network not in source] == []


def test_the_command_prints_a_row_per_method(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == table(METHODS)
    for name, method in METHODS.items():
        (row,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert method.trainer_name in row and all(preset in row for preset in method.presets)
        assert method.paper.title in printed


def test_the_command_writes_every_field_as_json(tmp_path, capsys):
    assert main(["methods", "--json", str(tmp_path / "methods.json")]) == 0
    written = read_json(tmp_path / "methods.json")
    assert list(written) == list(METHODS) and written["s2dc"]["trainer_name"] == "S2DCPretrainer"
    for name, method in METHODS.items():
        assert as_in_json(dataclasses.asdict(method)).items() <= written[name].items()
    capsys.readouterr()
    assert main(["methods", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == written
