"""The package that gets installed is the tree that one reads."""

import ast
import configparser
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import nnssl_plugin
from nnssl_plugin.cli.main import VERBS

MAPPED = ("pretrain_trainers", "plans")


@pytest.fixture(scope="module")
def setup_cfg(repository):
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg")
    return parser


def module_names():
    names = {m.name for m in pkgutil.walk_packages(nnssl_plugin.__path__, "nnssl_plugin.")}
    for folder in MAPPED:  # an editable install keeps them outside the package's folder
        package = importlib.import_module(f"nnssl_plugin.{folder}")
        names |= {package.__name__, *(m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}."))}
    return sorted(names)


def test_setup_cfg_lists_every_package_of_the_tree(setup_cfg, repository):
    listed = setup_cfg["options"]["packages"].split()
    folders = {path.parent.relative_to(repository) for path in (repository / "nnssl_plugin").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {f"nnssl_plugin.{folder}" for folder in MAPPED}
    assert sorted(listed) == sorted(expected)


def test_every_package_has_an_init(repository):
    folders = {path.parent for top in ("nnssl_plugin", *MAPPED) for path in (repository / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_nothing_but_the_package_lands_at_the_top_level(setup_cfg):
    options = setup_cfg["options"]
    assert {name.split(".")[0] for name in options["packages"].split()} == {"nnssl_plugin"}
    assert "py_modules" not in options
    mapped = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    assert mapped == {f"nnssl_plugin.{folder}": folder for folder in MAPPED}


@pytest.mark.parametrize("name", module_names())
def test_every_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__ or Path(module.__file__).name == "__init__.py"


def test_the_command_points_at_a_function(setup_cfg):
    command, target = setup_cfg["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert command == "nnssl_plugin"
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_flags_and_an_action(verb):
    module = importlib.import_module(f"nnssl_plugin.cli.{verb}")
    assert f"nnssl_plugin {verb}" in module.__doc__, "the help shows an example"
    assert callable(module.add_arguments) and callable(module.run)


def not_a_re_export(source: str) -> list[str]:
    """Statements of a module other than its docstring, imports and ``__all__``."""
    body = ast.parse(source).body
    allowed = (ast.Import, ast.ImportFrom)
    rest = [node for node in body if not isinstance(node, allowed)]
    rest = [n for n in rest if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    rest = [n for n in rest if not (isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")]
    return [ast.unparse(node) for node in rest]


def test_the_folder_that_nnunet_searches_holds_re_exports_only(repository):
    # a class defined there loses its identity: nnU-Net's finder drops the module from sys.modules
    modules = sorted((repository / "pretrain_trainers").rglob("*.py"))
    assert modules
    assert {path.name: not_a_re_export(path.read_text()) for path in modules} == {path.name: [] for path in modules}


def test_a_class_among_the_re_exports_would_be_noticed():
    source = '"""Doc."""\nfrom x import Y\n__all__ = ["Y"]\nclass Z(Y):\n    lr = 1\n'
    assert not_a_re_export(source) == ["class Z(Y):\n    lr = 1"]


def test_presets_are_json_with_settings_or_a_network(repository):
    presets = sorted((repository / "plans").glob("*.json"))
    assert presets
    for path in presets:
        assert {"pretraining", "architecture", "architecture_2d"} & set(json.loads(path.read_text())), path.name
