"""What pages take from the code is what the code says now, and the generator reads docstrings rightly."""

import ast
from dataclasses import replace
from functools import partial

import pytest
from registry_checks import generator

from nnssl_plugin.io.files import write_json
from nnssl_plugin.registry import METHODS, TASKS, Paper


@pytest.fixture(scope="module")
def generate(repository):
    return generator(repository)


def test_every_generated_page_is_current(generate, repository):
    """If this fails: python docs/generate.py"""
    stale = [
        str(path.relative_to(repository)) for path, text in generate.generated().items() if path.read_text() != text
    ]
    assert stale == []


def test_a_new_method_changes_every_table(generate, repository):
    added = replace(
        METHODS["s2dc"],
        title="Newcomer",
        trainer="a.b.NewcomerPretrainer",
        docs="docs/methods/newcomer.md",
        presets={"newcomer": "said of it"},
        paper=Paper("A title: with colon", ("Ada M. Example",), "A Venue", 2020, "10.1/x"),
    )
    pages = generate.generated(methods=METHODS | {"newcomer": added})
    text = {path.relative_to(repository).as_posix(): content for path, content in pages.items()}
    assert (
        "| [Newcomer](docs/methods/newcomer.md) | Example, *A title: with colon* | encoder | scans |"
        in text["README.md"]
    )
    assert "- [Newcomer](methods/newcomer.md): " in text["docs/README.md"]
    assert (
        "| `NewcomerPretrainer` | pretraining with [Newcomer](../methods/newcomer.md) | 2D, 3D |"
        in (text["docs/reference/commands.md"])
    )
    assert "| `newcomer` | `newcomer` |  | said of it |" in text["plans/README.md"]
    assert "| `s2dc-paper` | `s2dc` | `batch_size=1 method.grid=[1,4,4] method.matching" in text["plans/README.md"]
    for line in ('title: "A title: with colon"', "family-names: Example, given-names: Ada M.", "journal: A Venue"):
        assert line in text["CITATION.cff"]


def test_the_citation_file_is_yaml_with_everyone(generate, repository):
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    people = {a["family-names"] for reference in content["references"] for a in reference["authors"]}
    assert {author.split()[-1] for method in METHODS.values() for author in method.paper.authors} <= people
    assert all(reference["title"] for reference in content["references"])


def test_every_trainer_of_the_registry_is_in_the_table(repository):
    page = (repository / "docs" / "reference" / "commands.md").read_text()
    assert [e.trainer_name for e in (*METHODS.values(), *TASKS.values()) if f"| `{e.trainer_name}` |" not in page] == []


def test_badges_say_what_setup_cfg_says(repository):
    licence, python = ((repository / "docs" / "images" / f"{name}.svg").read_text() for name in ("licence", "python"))
    assert "Apache-2.0" in licence and "Apache License" in (repository / "LICENSE").read_text()
    assert "≥ 3.10" in python


def test_a_block_that_is_missing_is_named(generate):
    with pytest.raises(ValueError, match="no block 'methods'"):
        generate.with_blocks("# A page\n", {"methods": "table"})
    text = "a\n<!-- generated: x -->\nold\n<!-- end -->\nb\n"
    assert generate.with_blocks(text, {"x": "new"}) == "a\n<!-- generated: x -->\n\nnew\n\n<!-- end -->\nb\n"


def test_the_table_of_beds_links_to_the_page_that_a_summary_names(generate, tmp_path):
    row = {"look": "as trained", "labelled_cases": 5, "arm": "MAE", "paired": [0.6, 0.5], "seeds": 3}
    row["difference_to_scratch"] = {"mean": 0.1, "low": 0.05, "high": 0.15}
    bed = {"name": "bed", "metric": "AUROC", "evaluation_cases": 9, "rows": [row, row | {"arm": "S2DC"}]}
    bed["calibration"] = [{"labelled_cases": 5, "converged": True}]
    write_json(tmp_path / "plain.json", bed)
    write_json(tmp_path / "sections.json", bed | {"page": "several.md#the-bed"})
    longer = bed | {"name": "lengths", "rows": [row | {"arm": "MAE-4000"}, row | {"arm": "S2DC-MAE"}]}
    write_json(tmp_path / "a-lengths.json", longer)
    table = partial(generate.results_table, tmp_path, "results/", converged=True)
    *_, length, plain, section = table(arms=["MAE"]).splitlines()
    assert length.startswith("| [lengths](results/a-lengths.md), AUROC | 5 | as trained | MAE-4000 |")
    assert plain.startswith("| [bed](results/plain.md), AUROC | 5 |") and "**+0.100 (+0.050 to +0.150)**" in plain
    assert section.startswith("| [bed](results/several.md#the-bed), AUROC |") and section.endswith("| 9 | 3 |")
    assert len(table(arms=["MAE"]).splitlines()) == 2 + 3 and len(table().splitlines()) == 2 + 6


def test_beds_that_have_not_converged_stand_in_a_table_of_their_own(generate, tmp_path):
    row = {"look": "as trained", "arm": "MAE", "paired": [0.6, 0.5], "seeds": 3}
    row["difference_to_scratch"] = {"mean": 0.1, "low": None, "high": None}
    bed = {"name": "bed", "metric": "Dice", "evaluation_cases": 9}
    bed["rows"] = [row | {"labelled_cases": count} for count in (2, 5, 20, 50)]
    bed["calibration"] = [
        {"labelled_cases": count, "converged": told} for count, told in ((2, True), (5, False), (20, None))
    ]
    write_json(tmp_path / "bed.json", bed)
    labels = {
        converged: [
            line.split(" | ")[1] for line in generate.results_table(tmp_path, "", converged=converged).splitlines()[2:]
        ]
        for converged in (True, False)
    }
    assert labels == {True: ["2"], False: ["5", "20", "50"]}


SOURCE = '''
def work(self, image: str | Path, *, spacing: Sequence[float] = (1, 2), a_long_name_that_fills_it: bool = False) -> X:
    """Do it with :class:`~a.b.Thing` and ``code``.

    Of (B, C, *spatial).

    Args:
        image: a file, and
            more of it: even a colon.
        spacing: in mm.

    Returns:
        what it made.

    Raises:
        UserError: when it fails.
    """
'''


def test_a_docstring_becomes_markdown(generate):
    page = generate._function("nnssl.work", ast.parse(SOURCE).body[0])
    assert page == (
        "## work\n\n```python\nnnssl.work(\n    image: str | Path,\n    *,\n    spacing: Sequence[float] = (1, 2),\n"
        "    a_long_name_that_fills_it: bool = False,\n) -> X\n```\n\n"
        "Do it with `Thing` and `code`.\n\nOf (B, C, \\*spatial).\n\n"
        "**Args**\n\n- `image`: a file, and more of it: even a colon.\n- `spacing`: in mm.\n\n"
        "**Returns**\n\nwhat it made.\n\n**Raises**\n\n- `UserError`: when it fails.\n"
    )


def test_a_function_that_is_gone_is_named(generate, repository):
    with pytest.raises(LookupError, match=r"nnssl_plugin\.errors defines no nothing"):
        generate.find_definition(repository, "nnssl_plugin.errors.nothing")
