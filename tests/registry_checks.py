"""What a method of the registry must bring with it: each missing piece, in words."""

import ast
import configparser
import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnssl_plugin.io.files import read_json
from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.registry import METHODS, Method
from nnssl_plugin.settings import settings_from


def missing_pieces(name: str, root: Path, methods: Mapping[str, Method] = METHODS) -> list[str]:
    """What is missing or wrong of the method ``name`` in a repository; empty where all is there.

    Args:
        name: of the method and of its folder.
        root: the repository.
        methods: its registry.
    """
    if name not in methods:
        return [f"nnssl_plugin/registry.py has no entry '{name}'"]
    checks = (_package, _trainer, _presets, _page, _tests, _generated)
    return [problem for check in checks for problem in check(name, methods, root)]


def located(dotted: str) -> Any:
    """The object of a dotted path."""
    module, _, attribute = dotted.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def task_class(name: str) -> type[PretextTask]:
    """The one task that the ``objective.py`` of a method holds; of a task and one that extends it the latter."""
    module = importlib.import_module(f"{METHODS[name].package}.objective")
    found = {c for c in vars(module).values() if isinstance(c, type) and PretextTask in c.__mro__[1:]}
    (task,) = {c for c in found if not any(c in other.__mro__[1:] for other in found)}
    return task


def as_in_json(values: Any) -> Any:
    """Tuples read back as lists."""
    return json.loads(json.dumps(values))


def generator(root: Path) -> Any:
    """The module ``docs/generate.py``."""
    specification = importlib.util.spec_from_file_location("generate", root / "docs" / "generate.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _package(name: str, methods: Mapping[str, Method], root: Path) -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg")
    package = methods[name].package
    problems = [] if package in parser["options"]["packages"].split() else [f"setup.cfg does not list {package}"]
    folder = root.joinpath(*package.split("."))
    files = ("__init__.py", "settings.py", "objective.py", "trainer.py")
    return problems + [f"{folder.name} has no {file}" for file in files if not (folder / file).is_file()]


def _trainer(name: str, methods: Mapping[str, Method], root: Path) -> list[str]:
    module, _, trainer = methods[name].trainer.rpartition(".")
    for path in (root / "pretrain_trainers").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module == module and trainer in {a.name for a in node.names}:
                return []
    return [f"no module of pretrain_trainers re-exports {trainer}"]


def _presets(name: str, methods: Mapping[str, Method], root: Path) -> list[str]:
    method = methods[name]
    settings, training = located(method.settings)(), located(method.training)
    problems = [] if method.presets else ["it has no preset"]
    for number, preset in enumerate(method.presets):
        path = root / "plans" / f"{preset}.json"
        if not path.is_file():
            problems.append(f"plans/{preset}.json is missing")
            continue
        block = dict(read_json(path)["pretraining"])
        given = block.pop("method", {})
        if block.pop("method_name", name) != name:
            problems.append(f"plans/{preset}.json is for another method")
        settings_from(given, settings, where=preset), settings_from(block, training, where=preset)
        if number == 0 and given != as_in_json(dataclasses.asdict(settings)):
            problems.append(f"plans/{preset}.json does not write out every default of the method")
        everything = as_in_json(dataclasses.asdict(training))
        del everything["sources"]  # of one user's datasets
        if number == 0 and block != everything:
            problems.append(f"plans/{preset}.json does not write out every default of the training")
    return problems


def _page(name: str, methods: Mapping[str, Method], root: Path) -> list[str]:
    method, page = methods[name], root / methods[name].docs
    if not page.is_file():
        return [f"{method.docs} is missing"]
    text = page.read_text()
    wanted = [method.paper.title, method.licence, f"-tr {method.trainer_name}"]
    wanted += [f"`{field.name}`" for field in dataclasses.fields(located(method.settings))]
    wanted += ["## The idea", "## Command", "## Settings", "## What is logged", "## Memory and cost"]
    wanted += ["## What differs from the paper"]
    return [f"{method.docs} does not say {each}" for each in wanted if each not in text]


def _tests(name: str, methods: Mapping[str, Method], root: Path) -> list[str]:
    folder = "/".join(["tests", *methods[name].package.split(".")[1:]])
    return [] if list((root / folder).glob("test_*.py")) else [f"{folder} has no tests"]


def _generated(name: str, methods: Mapping[str, Method], root: Path) -> list[str]:
    pages = generator(root).generated(root, methods=methods)
    stale = [path.relative_to(root) for path, text in pages.items() if not path.is_file() or path.read_text() != text]
    return [f"{path} is not what docs/generate.py writes" for path in stale]
