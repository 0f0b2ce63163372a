"""Everything that a method's entry in the registry names exists."""

import dataclasses
import importlib
import json
import re

import pytest

from nnssl_plugin.io.files import read_json
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.registry import METHODS
from nnssl_plugin.settings import assignment, settings_from

pytestmark = pytest.mark.parametrize("name", METHODS)


def located(dotted):
    module, _, attribute = dotted.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def as_in_json(values):
    return json.loads(json.dumps(values))  # a tuple reads back as a list


def test_the_trainer_is_found_by_nnunet_and_is_the_installed_class(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    dotted = METHODS[name].trainer
    assert recursive_find_trainer_class_by_name(dotted.rpartition(".")[2]) is located(dotted)


def test_settings_are_a_frozen_dataclass_with_a_line_per_field(name, repository):
    settings = located(METHODS[name].settings)
    assert dataclasses.is_dataclass(settings) and settings.__dataclass_params__.frozen
    assert isinstance(located(METHODS[name].training), TrainingSettings)
    page = (repository / METHODS[name].docs).read_text()
    missing = [field.name for field in dataclasses.fields(settings) if f"`{field.name}`" not in page]
    assert missing == [], "fields absent from the method's page"


def test_presets_hold_settings_that_the_method_takes(name, repository):
    settings, training = located(METHODS[name].settings), located(METHODS[name].training)
    assert METHODS[name].presets
    for preset in METHODS[name].presets:
        content = read_json(repository / "plans" / f"{preset}.json")
        assert set(content) == {"pretraining"}, preset
        block = dict(content["pretraining"])
        method = block.pop("method")
        assert block.pop("method_name") == name
        read = settings_from(method, settings(), where=preset)
        assert as_in_json({key: getattr(read, key) for key in method}) == method
        read = settings_from(block, training, where=preset)
        assert {key: getattr(read, key) for key in block} == block


def test_the_recommended_preset_states_the_defaults(name, repository):
    method = METHODS[name]
    block = read_json(repository / "plans" / f"{method.presets[0]}.json")["pretraining"]
    assert block.pop("method_name") == name
    assert block.pop("method") == as_in_json(dataclasses.asdict(located(method.settings)()))
    assert block == {key: value for key, value in dataclasses.asdict(located(method.training)).items() if key in block}


def test_the_method_has_tests(name, repository):
    assert list((repository / "tests" / "methods" / name).glob("test_*.py"))


def test_the_paper_is_cited(name, repository):
    method = METHODS[name]
    citation = (repository / "CITATION.cff").read_text()
    page = (repository / method.docs).read_text()
    assert re.sub(r"\s+", " ", citation).count(method.paper.title) == 1
    assert method.paper.title in page and method.licence in page
    assert all(author.split()[-1] in citation for author in method.paper.authors)


def test_the_trainer_is_in_the_reference_of_commands(name, repository):
    page = (repository / "docs" / "reference" / "commands.md").read_text()
    assert f"| `{METHODS[name].trainer.rpartition('.')[2]}` |" in page


def test_the_page_is_in_the_index(name, repository):
    page = METHODS[name].docs.removeprefix("docs/")
    assert f"({page})" in (repository / "docs" / "README.md").read_text()


ROW = re.compile(r"^\| `([a-z0-9-]+)` \| `([a-z0-9]+)` \| (.*?) ?\| .+ \|$", re.MULTILINE)


def test_the_table_of_presets_says_what_each_sets(name, repository):
    method, page = METHODS[name], (repository / "plans" / "README.md").read_text()
    rows = {preset: sets for preset, of, sets in ROW.findall(page) if of == name}
    assert rows == {preset: differences(preset, method, repository) for preset in method.presets}


def differences(preset, method, repository):
    """What a preset sets other than the method's defaults, as ``--set`` takes it."""
    block = dict(read_json(repository / "plans" / f"{preset}.json")["pretraining"])
    own = as_in_json(dataclasses.asdict(located(method.settings)()))
    common = as_in_json(dataclasses.asdict(located(method.training)))
    changed = {f"method.{key}": value for key, value in block.pop("method").items() if value != own[key]}
    del block["method_name"]
    changed = {key: value for key, value in block.items() if value != common[key]} | changed
    return (
        "`" + " ".join(assignment(key, value).replace("'", "") for key, value in changed.items()) + "`"
        if changed
        else ""
    )
