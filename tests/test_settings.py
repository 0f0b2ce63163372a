"""Settings by annotation: what each kind of field takes, refuses and says, and the mending command of every error."""

import importlib
import json
import math
import pkgutil
import random
import shlex
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import pytest

import nnssl_plugin
from nnssl_plugin.errors import UserError
from nnssl_plugin.settings import (
    Count,
    Positive,
    Range,
    assignment,
    closest,
    converted,
    described,
    settings_from,
    with_brackets,
)


@dataclass(frozen=True)
class Example:
    steps: Count = 3
    rate: Positive = 0.1
    share: Annotated[float, Range(gt=0, le=1)] = 0.5
    kind: Literal["mask", "none"] = "mask"
    flag: bool = True
    either: bool | None = None
    grid: tuple[Count, Count, Count] = (1, 1, 1)
    pairs: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    names: tuple[str, ...] = ()
    file: str | None = None
    most: Annotated[int, Range(lt=9)] | None = None

    def __post_init__(self) -> None:
        if self.steps > 100 and self.flag:
            raise UserError("steps and flag", "")


def read(block):
    return settings_from(block, Example(), "the example block", set_as="example.")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 1, 1),
        ("rate", 2, 2.0),
        ("rate", 1e-300, 1e-300),
        ("share", 1, 1.0),
        ("kind", "none", "none"),
        ("either", None, None),
        ("either", False, False),
        ("grid", [1, 2, 3], (1, 2, 3)),
        ("pairs", [[0, 1], [2.5, 3]], ((0.0, 1.0), (2.5, 3.0))),
        ("pairs", [], ()),
        ("names", ["a", "b"], ("a", "b")),
        ("file", "x.pth", "x.pth"),
        ("file", None, None),
        ("most", -5, -5),
        ("most", None, None),
    ],
)
def test_what_a_field_takes(name, value, expected):
    settings = read({name: value})
    assert getattr(settings, name) == expected and type(getattr(settings, name)) is type(expected)
    assert settings == Example(**{name: expected})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "a whole number from 1"),
        ("steps", True, "a whole number from 1"),
        ("steps", 2.0, "a whole number from 1"),
        ("steps", None, "a whole number from 1"),
        ("rate", 0, "a number above 0"),
        ("rate", False, "a number above 0"),
        ("rate", math.nan, "a number above 0"),
        ("rate", math.inf, "a number above 0"),
        ("rate", 10**400, "a number above 0"),
        ("rate", "three", "a number above 0"),
        ("share", 1.0001, "a number in (0, 1]"),
        ("share", 0.0, "a number in (0, 1]"),
        ("kind", "blur", "one of mask, none"),
        ("kind", None, "one of mask, none"),
        ("flag", 1, "true or false"),
        ("either", 1, "true or false or null"),
        ("grid", [1, 1], "a list of 3, each a whole number from 1"),
        ("grid", [1, 1, 0], "a list of 3, each a whole number from 1"),
        ("grid", [1, 1, True], "a list of 3, each a whole number from 1"),
        ("grid", 4, "a list of 3, each a whole number from 1"),
        ("pairs", [[0, 1], [0]], "a list, each entry a list of 2, each a number"),
        ("names", "a", "a list, each entry a text"),
        ("names", {"a": 1}, "a list, each entry a text"),
        ("file", 3, "a text or null"),
        ("most", 9, "a whole number below 9 or null"),
        ("steps", [], "a whole number from 1"),
    ],
)
def test_what_a_field_refuses_and_the_command_that_mends_it(name, value, expected):
    with pytest.raises(UserError) as error:
        read({name: value})
    assert error.value.problem.startswith(f"Setting '{name}' in the example block is ")
    assert error.value.problem.endswith(f"; expected {expected}.")
    *command, assigned = shlex.split(error.value.remedy)
    assert command[2:] == shlex.split("nnssl_plugin plan -d ID -p PLANS -n NAME --set")
    key, _, text = assigned.partition("=")
    assert key == f"example.{name}"
    read({name: text if name in ("kind", "file") and text != "null" else json.loads(text)})


@pytest.mark.parametrize(
    ("block", "suggestion"),
    [
        ({"step": 1}, "example.steps"),
        ({"gird": [1, 1, 1]}, "example.grid"),
        ({"patch_size": [1]}, "configurations.x.patch_size"),
        ({"entirely_different": 1}, None),
    ],
)
def test_unknown_names_get_a_suggestion_also_from_elsewhere(block, suggestion):
    with pytest.raises(UserError, match="Unknown setting") as error:
        settings_from(
            block, Example(), "the block", set_as="example.", elsewhere=["configurations.x.patch_size", "other.steps"]
        )
    said = f"did you mean '{suggestion}'?" if suggestion else f"'{next(iter(block))}' in the block."
    assert error.value.problem.endswith(said) and "steps, rate" in error.value.remedy


@pytest.mark.parametrize("block", [3, "text", None, [1]])
def test_a_block_that_is_none_is_refused(block):
    with pytest.raises(UserError, match=r"The example block is .*expected a block of settings"):
        read(block)


def test_several_fields_together_are_checked_last():
    with pytest.raises(UserError, match="steps and flag"):
        read({"steps": 101})
    assert read({"steps": 101, "flag": False}).steps == 101
    with pytest.raises(UserError, match="rate"):
        read({"steps": 101, "rate": "x"})


def test_long_values_are_cut_short():
    with pytest.raises(UserError) as error:
        read({"steps": "x" * 10_000})
    assert len(error.value.problem) < 300


@pytest.mark.parametrize(
    ("text", "annotation", "meant"),
    [
        ("32,40,32", tuple[int, ...], [32, 40, 32]),
        ("a, b", tuple[str, ...], ["a", "b"]),
        ("2", tuple[int, ...], [2]),
        ("true,false", tuple[bool, ...], [True, False]),
    ],
)
def test_a_list_without_brackets_is_understood_for_the_remedy(text, annotation, meant):
    assert with_brackets(text, annotation) == meant


@pytest.mark.parametrize("value", ["three", 3, None, "1,two", "1,2,"])
def test_what_is_no_list_without_brackets(value):
    with pytest.raises(ValueError):
        with_brackets(value, tuple[int, ...])


def test_ranges_agree_with_plain_comparisons():
    draw = random.Random(0)
    for _ in range(300):
        bounds = {name: draw.choice([None, draw.randint(-3, 3)]) for name in draw.sample(["gt", "ge", "lt", "le"], k=2)}
        value = draw.uniform(-4, 4) if draw.random() < 0.5 else float(draw.randint(-4, 4))
        checks = {"gt": "value > bound", "ge": "value >= bound", "lt": "value < bound", "le": "value <= bound"}
        expected = all(
            bound is None or eval(checks[name], {"value": value, "bound": bound}) for name, bound in bounds.items()
        )
        assert Range(**bounds).holds(value) == expected, (bounds, value)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"ge": 1}, "from 1"),
        ({"gt": 0}, "above 0"),
        ({"le": 2.5}, "up to 2.5"),
        ({"lt": 9}, "below 9"),
        ({"ge": 0, "lt": 1}, "in [0, 1)"),
        ({"gt": 0, "le": 1}, "in (0, 1]"),
    ],
)
def test_ranges_in_words(bounds, said):
    assert str(Range(**bounds)) == said


def test_the_closest_name_is_the_first_of_equal_ones():
    assert closest("sead", ["a.seed", "b.seed"]) == "a.seed"
    assert closest("epoch", ["epochs"]) == "epochs"
    assert closest("xyz", ["epochs"]) is None


def test_assignments_survive_the_shell():
    assert shlex.split(assignment("a.b", [1, [2, 3]])) == ["a.b=[1,[2,3]]"]
    assert shlex.split(assignment("a", "it's")) == ["a=it's"]
    assert assignment("a", None) == "a=null"


def settings_classes():
    """Every frozen settings dataclass in a ``settings.py`` of the package."""
    for module in pkgutil.walk_packages(nnssl_plugin.__path__, "nnssl_plugin."):
        if module.name.endswith(".settings") and module.name != "nnssl_plugin.settings":
            content = importlib.import_module(module.name)
            yield from (c for c in vars(content).values() if is_dataclass(c) and c.__module__ == module.name)


@pytest.mark.parametrize("kind", [pytest.param(c, id=f"{c.__module__}.{c.__name__}") for c in settings_classes()])
def test_every_default_is_one_that_its_field_takes(kind):
    default, hints = kind(), get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        value = getattr(default, field.name)
        assert converted(value, hints[field.name]) == value, field.name
        assert "class" not in described(hints[field.name]) and hints[field.name] is not Any, field.name
