"""How the command finds captioners: by name, by dotted path, with options, and never one that sends without a host."""

from dataclasses import dataclass

import pytest

from nnssl_plugin.captions.captioners import CAPTIONERS, open_captioner, signature
from nnssl_plugin.captions.template import TemplateCaptioner, TemplateOptions
from nnssl_plugin.errors import UserError


@dataclass(frozen=True)
class RemoteOptions:
    host: str = "default.example"
    words: int = 100


class Remote:
    name = "remote"
    Options = RemoteOptions

    def __init__(self, options):
        self.options = options

    def describe(self, slices, facts):
        return ["text"] * len(slices)


REMOTE = f"{__name__}:Remote"


LEAST = {"openai": {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}}
"""Options that a captioner of the table needs."""


def test_every_name_of_the_table_is_a_captioner(tmp_path):
    (tmp_path / "c.txt").write_text("A text.")
    for name in CAPTIONERS:
        captioner = open_captioner(
            name, {**LEAST.get(name, {}), **({"texts": str(tmp_path)} if name == "file" else {})}
        )
        assert captioner.name == name and signature(captioner).split(" ")[0] == name


def test_a_signature_names_what_shapes_the_texts_and_nothing_of_the_way_to_them():
    least = LEAST["openai"]
    assert signature(open_captioner("openai", least)) == "openai model=m"
    on_the_way = {"endpoint": "http://127.0.0.1:2/v1", "concurrency": 1, "timeout": 5, "attempts": 1, "price_in": 3}
    assert signature(open_captioner("openai", {**least, **on_the_way})) == "openai model=m"
    assert signature(open_captioner("openai", {**least, "prompt": "Say."})) == "openai model=m prompt=Say."
    long = signature(open_captioner("openai", {**least, "prompt": "word " * 100}))
    assert long != signature(open_captioner("openai", {**least, "prompt": "word " * 101})) and len(long) < 50


def test_options_reach_the_captioner_and_its_signature():
    captioner = open_captioner("template", {"size": False})
    assert isinstance(captioner, TemplateCaptioner) and captioner.options == TemplateOptions(size=False)
    assert signature(captioner) == "template size=False"


def test_a_class_of_another_package_is_found_by_its_path():
    captioner = open_captioner(REMOTE, {"host": "localhost", "words": 5})
    assert type(captioner) is Remote and captioner.options == RemoteOptions("localhost", 5)


@pytest.mark.parametrize("values", [{}, {"words": 5}, {"host": ""}])
def test_a_captioner_that_sends_is_only_made_where_the_host_is_named(values):
    with pytest.raises(UserError, match="another computer") as caught:
        open_captioner(REMOTE, values)
    assert "--set host=HOST" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("oracle", {}, "no captioner oracle"),
        ("no_such_package.module:Class", {}, "cannot be imported"),
        (f"{__name__}:Absent", {}, "cannot be imported"),
        (f"{__name__}:RemoteOptions", {}, "no captioner: it has no name, Options, describe"),
        ("template", {"colour": 1}, "Unknown setting 'colour'"),
        ("template", {"size": "no"}, "Setting 'size'"),
    ],
)
def test_mistakes_are_named(name, values, problem):
    with pytest.raises(UserError, match=problem) as caught:
        open_captioner(name, values)
    assert caught.value.problem
