"""The pages agree with the code: links lead somewhere, every verb and every field of a plan's block is described."""

import dataclasses
import re

import pytest
from settings_tables import field_docstrings, settings_table, with_tables

from nnssl_plugin.cli.main import VERBS
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.tasks.classification.settings import ClassificationSettings
from nnssl_plugin.tasks.segmentation.trainer import FinetuningSettings

LINK = re.compile(r"\]\(([^)\s]+)\)")


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


def test_a_table_of_settings_is_written_from_the_dataclass():
    marked = "a\n<!-- settings: nnssl_plugin.pretraining.settings.TrainingSettings -->\nold\n<!-- end -->\nb"
    written = with_tables(marked)
    assert "old" not in written and written.startswith("a\n<!-- settings:") and written.endswith("\n<!-- end -->\nb")
    assert (
        "| `gradient_clip` | a number above 0 | `12.0` | Largest norm of the gradient (12 is nnU-Net's). |" in written
    )
    assert with_tables(written) == written


def test_every_page_is_reached_from_the_index(repository):
    index = repository / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert [p.name for p in (repository / "docs").rglob("*.md") if p != index and p.resolve() not in linked] == []
