"""Pages agree with the code: links and files exist, commands parse, verbs and fields are described, words are plain."""

import argparse
import dataclasses
import re
import shlex

import pytest
from settings_tables import field_docstrings, settings_table, with_tables

from nnssl_plugin.captions.openai_server import OpenAIOptions
from nnssl_plugin.cli.main import VERBS, build_parser
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.tasks.classification.settings import ClassificationSettings
from nnssl_plugin.tasks.segmentation.trainer import FinetuningSettings

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
COMMAND = "nnssl_plugin"
ENDS = {";", "&&", "||", "|", "done", "&"}
"""Words of the shell at which a command ends."""
OTHER_REPOSITORIES = ("training/nnsslTrainer/",)
"""Where paths begin that are MIC-DKFZ/nnssl's."""
PLACEHOLDERS = ("…", "...")
PRIVATE_WORDS = re.compile(r"\b(road|twins?|shelf|shelves|front door)\b", re.IGNORECASE)
OF_THIS_MACHINE = re.compile(r"(?<![\w.$}])/(?:work|tmp|root|opt|home)/\w")


def pages(repository):
    return [*repository.glob("*.md"), *(repository / "docs").rglob("*.md"), *(repository / "plans").glob("*.md")]


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page):
    """Links of a page to files or headings that are not there; addresses on the web are not tried."""
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


def test_links_lead_somewhere(repository):
    assert {page.name: dead_links(page) for page in pages(repository) if dead_links(page)} == {}


def test_a_dead_link_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The `one` heading\n[a](#the-one-heading) [b](#other) [c](absent.md) [d](https://example.org)\n")
    assert dead_links(page) == ["#other", "absent.md"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_reference(verb, repository):
    assert f"| `{verb}` |" in (repository / "docs" / "reference" / "commands.md").read_text()


@pytest.mark.parametrize("settings", [TrainingSettings, FinetuningSettings, ClassificationSettings])
def test_every_field_of_a_block_is_in_the_reference(settings, repository):
    page = (repository / "docs" / "reference" / "plan-blocks.md").read_text()
    assert settings_table(settings) in page and page == with_tables(page), "python tests/settings_tables.py"
    assert field_docstrings(settings).keys() == {field.name for field in dataclasses.fields(settings)}


def test_the_options_of_the_captioner_that_asks_a_server_are_in_its_page(repository):
    page = (repository / "docs" / "how-to" / "describe-slices.md").read_text()
    assert settings_table(OpenAIOptions) in page and page == with_tables(page), "python tests/settings_tables.py"
    assert field_docstrings(OpenAIOptions).keys() == {field.name for field in dataclasses.fields(OpenAIOptions)}


def test_a_table_of_settings_is_written_from_the_dataclass():
    marked = "a\n<!-- settings: nnssl_plugin.pretraining.settings.TrainingSettings -->\nold\n<!-- end -->\nb"
    written = with_tables(marked)
    assert (
        "\nold\n" not in written and written.startswith("a\n<!-- settings:") and written.endswith("\n<!-- end -->\nb")
    )
    assert (
        "| `gradient_clip` | a number above 0 | `12.0` | Largest norm of the gradient (12 is nnU-Net's). |" in written
    )
    assert with_tables(written) == written


def test_every_page_is_reached_from_the_index(repository):
    index = repository / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert [p.name for p in (repository / "docs").rglob("*.md") if p != index and p.resolve() not in linked] == []


def shell_commands(text):
    """The arguments of every ``nnssl_plugin …`` in the shell blocks of a page, one list each."""
    for language, block in FENCE.findall(text):
        if language not in ("bash", "sh"):
            continue
        joined = re.sub(r" \[(-[^\]]*)\]", r" \1", block.replace("\\\n", " "))  # [--flag VALUE] may be left out
        for line in joined.splitlines():
            words = shlex.split(line, comments=True) if "$(" not in line and COMMAND in line else []
            yield from _commands(_separated(words))


def _separated(words):
    """The words with the semicolons at their ends as words of their own."""
    return [part for word in words for part in ((word[:-1], ";") if word.endswith(";") and len(word) > 1 else (word,))]


def _commands(words):
    while COMMAND in words:
        words = words[words.index(COMMAND) + 1 :]
        end = next((number for number, word in enumerate(words) if word in ENDS), len(words))
        yield words[:end]


def why_it_does_not_parse(words):
    """What the real parser says of the arguments of a command; empty where it takes them."""
    if not words or words[0] == "--version" or words == ["VERB", "--help"]:
        return ""
    if words[0] not in VERBS:
        return f"no verb {words[0]}"
    if "--help" in words or any(mark in word for word in words for mark in PLACEHOLDERS):
        return unknown_flags(words)
    try:
        _, unknown = build_parser(words[0]).parse_known_args(words)
    except Refused as refused:
        return str(refused)
    return f"unknown: {unknown}" if unknown and words[0] != "train" else ""


def unknown_flags(words):
    """For commands that stand in prose, in part: flags that the verb does not have."""
    if words[0] == "train":
        return ""
    known = flags_of(build_parser(words[0]), words[0])
    given = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-zA-Z]", word)} - {"--help", "-h"}
    return f"no flag {sorted(given - known)}" if given - known else ""


def flags_of(parser, verb):
    """Every flag of a verb and of the kinds below it."""
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    waiting, flags = [verbs.choices[verb]], set()
    while waiting:
        for action in waiting.pop()._actions:
            flags.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return flags


class Refused(Exception):
    """What argparse would have printed before it exits."""


@pytest.fixture
def refusing(monkeypatch):
    def refuse(_parser, message):
        raise Refused(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)


def test_commands_in_shell_blocks_parse(repository, refusing):
    commands = [(page.name, words) for page in pages(repository) for words in shell_commands(page.read_text("utf-8"))]
    assert len(commands) > 50
    wrong = [(page, shlex.join(words), why) for page, words in commands if (why := why_it_does_not_parse(words))]
    assert wrong == []


def test_commands_in_prose_name_verbs_and_flags_that_exist(repository):
    wrong = []
    for page in pages(repository):
        for code in CODE.findall(FENCE.sub("", page.read_text("utf-8"))):
            for words in _commands(code.split()) if code.startswith(COMMAND) else ():
                if words and words[0] in VERBS and (why := unknown_flags(words)):
                    wrong.append((page.name, code, why))
                elif words and re.fullmatch(r"[a-z]+", words[0]) and words[0] not in VERBS:
                    wrong.append((page.name, code, "no such verb"))
    assert wrong == []


def test_a_wrong_command_would_be_noticed(refusing):
    text = "```bash\nnnssl_plugin adapt -d 7 \\\n  --nothing; nnssl_plugin fly -d 1   # said\nnnssl_plugin env\n```\n"
    first, second, third = shell_commands(text)
    assert (first, second, third) == (["adapt", "-d", "7", "--nothing"], ["fly", "-d", "1"], ["env"])
    assert "-n" in why_it_does_not_parse(first) and "no verb" in why_it_does_not_parse(second)
    assert "--fly" in unknown_flags(["adapt", "--fly"]) and not unknown_flags(["evaluate", "-ref", "DIR"])
    assert not why_it_does_not_parse(third)


def paths_named(text, tops):
    """Paths in code spans that begin with a folder of the repository or of the package."""
    for code in CODE.findall(FENCE.sub("", text)):
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", code) and "NAME" not in code
        if is_path and code.split("/")[0] in tops and not code.startswith(OTHER_REPOSITORIES):
            yield code


def test_files_that_pages_name_exist(repository):
    inside = repository / "nnssl_plugin"
    places = {place.name: place.parent for root in (inside, repository) for place in root.iterdir() if place.is_dir()}
    missing = [
        (page.name, path)
        for page in pages(repository)
        for path in paths_named(page.read_text("utf-8"), places)
        if not any((root / path).exists() for root in (repository, inside))
    ]
    assert missing == []


def test_a_missing_file_would_be_noticed():
    text = "`docs/absent.md` `plans/NAME.json` `fold_all/x.png` `io/files.py`\n```\n`docs/in_a_block.md`\n```\n"
    assert list(paths_named(text, {"docs", "plans", "io"})) == ["docs/absent.md", "io/files.py"]


def test_pictures_are_small(repository):
    pictures = list((repository / "docs").rglob("*.png"))
    assert pictures and [path.name for path in pictures if path.stat().st_size > 300_000] == []


def test_pages_use_the_words_of_the_field_and_name_no_place_of_a_machine(repository):
    said = [
        (page.name, found[0])
        for page in pages(repository)
        for pattern in (PRIVATE_WORDS, OF_THIS_MACHINE)
        if (found := pattern.search(page.read_text("utf-8")))
    ]
    assert said == []
