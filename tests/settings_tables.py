"""Tables of settings in the pages, generated from the dataclasses: ``python tests/settings_tables.py`` writes them.

A table stands between ``<!-- settings: DOTTED.PATH -->`` and ``<!-- end -->``.
"""

import ast
import inspect
import json
import pydoc
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

from nnssl_plugin.settings import described

TABLE = re.compile(r"(<!-- settings: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The text of a page with its tables as the dataclasses have them now."""
    return TABLE.sub(lambda found: found[1] + settings_table(pydoc.locate(found[2])) + found[3], page)


def settings_table(settings: type) -> str:
    """A line per field: name, what it takes, default, and the docstring below it."""
    meanings, takes, default = field_docstrings(settings), get_type_hints(settings, include_extras=True), settings()
    rows = [
        (f"`{field.name}`", described(takes[field.name]), shown(getattr(default, field.name)), meanings[field.name])
        for field in fields(settings)
    ]
    lines = [("field", "takes", "default", "meaning"), ("---",) * 4, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace(
        "| --- | --- | --- | --- |", "|---|---|---|---|"
    )


def field_docstrings(settings: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited ones first, in Markdown and on one line."""
    classes = [each for each in reversed(settings.__mro__) if each is not object]
    return {
        node.target.id: re.sub(r"\s+", " ", below.value.value).replace("``", "`")
        for each in classes
        for node, below in pairwise(ast.parse(inspect.getsource(each)).body[0].body)
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def shown(value) -> str:
    if value == "":
        return "empty"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


if __name__ == "__main__":
    for path in Path(__file__).parents[1].glob("docs/**/*.md"):
        page = path.read_text(encoding="utf-8")
        if TABLE.search(page):
            path.write_text(with_tables(page), encoding="utf-8")
