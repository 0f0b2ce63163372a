"""Write what the pages take from the code: tables of methods, trainers and presets, citations, and the API page.

    python docs/generate.py

``tests/test_generated_pages.py`` compares every page with what this writes.
"""

import ast
import configparser
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from nnssl_plugin import FUNCTIONS, __version__
from nnssl_plugin.io.files import read_json
from nnssl_plugin.registry import METHODS, RELATED_PAPERS, TASKS, Method, Paper, Task
from nnssl_plugin.settings import assignment

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = (
    "nnssl_plugin.features.pretrained_backbone.PretrainedBackbone",
    "nnssl_plugin.tasks.retrieval.index.Index",
    "nnssl_plugin.tasks.retrieval.index.Neighbours",
)
"""Classes that the functions of the API return and that are used through their methods."""
FAMILIES = {
    "PlainConvUNet": "U-Net",
    "ResidualEncoderUNet": "ResEnc",
    "Primus": "Primus",
    "SwinUNETR": "SwinUNETR",
    "PatchViT": "PatchViT",
    "SegResNetDS": "SegResNet",
    "ResNetUNet": "ResNet U-Net",
    "SAMUNet": "SAM's ViT",
}
"""Class of a network → how tables call it."""
BASELINE = "MAE"
"""The arm of the beds that the README shows, with its lengths (``MAE-4000``)."""
API_HEAD = """# Python API

<!-- Written by docs/generate.py from the docstrings; edit those. -->

```python
import nnssl_plugin as nnssl

nnssl.prepare("my_scans", 501, "Unlabelled", modality="MR")  # nnU-Net's folders come from the environment
nnssl.caption(501, body_part="brain")
# plan and train with nnU-Net's own commands, then:
print(nnssl.inspect("checkpoint_final.pth")["method"])
backbone = nnssl.load_backbone("checkpoint_final.pth")
vector = backbone.embed("scan.nii.gz")
index = nnssl.load_index("my_index")  # of nnssl_plugin embed
found = index.search(index.vectors[:1], k=10)
nnssl.adapt("7", weights="checkpoint_final.pth", name="med3d")
```

Each function does what [its verb](commands.md) does, and raises `UserError` (`problem`, `remedy`) where the command
prints an error. `import nnssl_plugin` alone imports neither torch nor nnU-Net. Training and prediction stay nnU-Net's:
`nnUNetv2_train`, `nnUNetv2_predict`.
"""


def generated(
    root: Path = REPOSITORY, *, methods: Mapping[str, Method] = METHODS, tasks: Mapping[str, Task] = TASKS
) -> dict[Path, str]:
    """Every page with generated text → its whole text as it should be.

    Args:
        root: the repository, whose pages hold the text around the generated blocks.
        methods: the registry's methods.
        tasks: the registry's tasks.
    """
    blocks = {
        "README.md": {
            "methods": methods_table(methods),
            "results": results_table(root / "docs/results/beds", "docs/results/", converged=True, arms=[BASELINE]),
        },
        "docs/results.md": {
            "results": results_table(root / "docs/results/beds", "results/", converged=True),
            "head starts": results_table(root / "docs/results/beds", "results/", converged=False),
        },
        "docs/README.md": {"methods": methods_index(methods)},
        "docs/reference/commands.md": {"trainers": trainers_table(methods, tasks)},
        "plans/README.md": {"presets": presets_table(methods, root / "plans")},
    }
    pages = {root / page: with_blocks((root / page).read_text("utf-8"), given) for page, given in blocks.items()}
    pages[root / "CITATION.cff"] = citation_file((root / "CITATION.cff").read_text("utf-8"), methods)
    pages[root / "docs/reference/api.md"] = api_page(root)
    facts = read_metadata(root)
    pages[root / "docs/images/licence.svg"] = badge("licence", facts["license"])
    pages[root / "docs/images/python.svg"] = badge("python", facts["python_requires"].replace(">=", "≥ "))
    return pages


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The text with what stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: where a block is missing.
    """
    for name, content in blocks.items():
        start, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"no block '{name}' between {start.strip()} and {end.strip()}")
        text = before + start + "\n" + content + "\n" + rest[rest.index(end) :]
    return text


# ---------------------------------------------------------------------- tables of the registry


def methods_table(methods: Mapping[str, Method]) -> str:
    """For the README: what each method pretrains, needs and takes."""
    rows = [("method", "paper", "pretrains", "needs", "plans", "networks")]
    for method in methods.values():
        rows.append(
            (
                f"[{method.title}]({method.docs})",
                f"{_short_authors(method.paper)}, *{method.paper.title}*",
                " and ".join(method.trains),
                "scans and " + method.needs if method.needs else "scans",
                _plans(method.dimensions),
                _networks(method.networks),
            )
        )
    return _table(rows)


def methods_index(methods: Mapping[str, Method]) -> str:
    """For the index of the documentation: a line per page."""
    return "\n".join(f"- [{m.title}]({m.docs.removeprefix('docs/')}): {m.summary}." for m in methods.values())


def trainers_table(methods: Mapping[str, Method], tasks: Mapping[str, Task]) -> str:
    """Every trainer that nnU-Net's ``-tr`` takes."""
    rows = [("trainer", "for", "plans")]
    for method in methods.values():
        link = method.docs.removeprefix("docs/")
        rows.append(
            (f"`{method.trainer_name}`", f"pretraining with [{method.title}](../{link})", _plans(method.dimensions))
        )
    for name, task in tasks.items():
        link = task.docs.removeprefix("docs/")
        rows.append((f"`{task.trainer_name}`", f"[{name}](../{link}): {task.summary}", _plans(task.dimensions)))
    return _table(rows)


def presets_table(methods: Mapping[str, Method], folder: Path) -> str:
    """The presets of methods with what each sets; the first of a method is its recommendation."""
    rows = [("preset", "method", "sets, other than the defaults", "what it is")]
    for name, method in methods.items():
        rows += [
            (f"`{p}`", f"`{name}`", _sets(folder / f"{p}.json", method), said) for p, said in method.presets.items()
        ]
    return _table(rows)


def results_table(folder: Path, link: str, *, converged: bool, arms: Sequence[str] | None = None) -> str:
    """Comparisons of the beds: each arm beside its twin from scratch, from the summaries kept in ``folder``.

    Args:
        folder: with the summary ``NAME.json`` of each bed.
        link: from the page to the folder of the beds' pages: ``NAME.md``, or what a summary names as its ``page``.
        converged: numbers of labels with which training from scratch has converged, or those with which it has not.
        arms: those to show, with what they are called behind a hyphen; None: all.
    """
    rows = [("bed", "labels", "images", "arm", "pretrained", "scratch", "difference (95 % interval)", "n", "seeds")]
    for path in sorted(folder.glob("*.json")):
        bed = read_json(path)
        calibrated = {row["labelled_cases"] for row in bed["calibration"] if row["converged"]}
        shown = [row for row in bed["rows"] if row["difference_to_scratch"] is not None]
        rows += [
            (
                f"[{bed['name']}]({link}{bed.get('page', f'{path.stem}.md')}), {bed['metric']}",
                str(row["labelled_cases"]),
                row["look"],
                row["arm"],
                *(f"{mean:.3f}" for mean in row["paired"]),
                _with_interval(row["difference_to_scratch"]),
                str(bed["evaluation_cases"]),
                str(row["seeds"]),
            )
            for row in shown
            if (row["labelled_cases"] in calibrated) is converged
            and (arms is None or row["arm"].partition("-")[0] in arms)
        ]
    return _table(rows)


def _with_interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:+.3f}"
    text = f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})".replace("-", "−")
    apart = found["low"] > 0 or found["high"] < 0
    return f"**{text}**" if apart else text


def _sets(preset: Path, method: Method) -> str:
    """What a preset sets other than the method's defaults, as ``--set`` takes it."""
    if not preset.is_file():
        return ""
    block = read_json(preset)["pretraining"]
    own, common = _as_in_json(asdict(_located(method.settings)())), _as_in_json(asdict(_located(method.training)))
    given = {key: value for key, value in block.items() if key not in ("method", "method_name")}
    changed = {key: value for key, value in given.items() if value != common[key]}
    changed |= {f"method.{key}": value for key, value in block["method"].items() if value != own[key]}
    return (
        "`" + " ".join(assignment(key, value).replace("'", "") for key, value in changed.items()) + "`"
        if changed
        else ""
    )


def _located(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def _as_in_json(values: Any) -> Any:
    return json.loads(json.dumps(values))


def citation_file(text: str, methods: Mapping[str, Method]) -> str:
    """``CITATION.cff`` with the present version, and the papers of all methods among its references."""
    head = re.sub(r"(?m)^version: .*$", f"version: {__version__}", text.partition("references:\n")[0])
    named = [*((method.title, method.paper) for method in methods.values()), *RELATED_PAPERS.items()]
    papers: dict[str, list[str]] = {}
    for title, paper in named:  # two methods may come from one paper
        papers.setdefault(paper.title, []).append(title)
    first = {paper.title: paper for _, paper in reversed(named)}
    return head + "references:\n" + "".join(_reference("; ".join(of), first[paper]) for paper, of in papers.items())


def _reference(title: str, paper: Paper) -> str:
    lines = [
        f"  - type: {'article' if paper.venue else 'generic'}",
        f"    title: {_yaml(paper.title)}",
        f"    notes: {title}",
        "    authors:",
        *(f"      - {{family-names: {a.split()[-1]}, given-names: {' '.join(a.split()[:-1])}}}" for a in paper.authors),
        *([f"    journal: {paper.venue}"] if paper.venue else []),
        *([f"    year: {paper.year}"] if paper.year else []),
        *([f"    doi: {paper.doi}"] if paper.doi else []),
        *([f"    url: {paper.url}"] if paper.url else []),
    ]
    return "\n".join(lines) + "\n"


def _yaml(text: str) -> str:
    return f'"{text}"' if ":" in text else text


def _short_authors(paper: Paper) -> str:
    first = paper.authors[0].split()[-1]
    return first if len(paper.authors) == 1 else f"{first} et al."


def _plans(dimensions: Sequence[int]) -> str:
    return ", ".join(f"{count}D" for count in dimensions)


def _networks(networks: Sequence[str]) -> str:
    return ", ".join(FAMILIES[network] for network in networks)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


# ---------------------------------------------------------------------- badges


def read_metadata(root: Path) -> dict[str, str]:
    """Licence and Python versions as ``setup.cfg`` states them."""
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg", encoding="utf-8")
    return {"license": parser["metadata"]["license"], "python_requires": parser["options"]["python_requires"]}


def badge(label: str, value: str) -> str:
    """A badge as SVG: label on grey, value on blue."""
    left, right = (10 + 7 * len(text) for text in (label, value))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img">
<title>{label}: {escape(value)}</title>
<rect width="{left}" height="20" fill="#555"/><rect x="{left}" width="{right}" height="20" fill="#0a6ebd"/>
<g fill="#fff" font-family="Verdana,sans-serif" font-size="11" text-anchor="middle">
<text x="{left / 2}" y="14">{label}</text><text x="{left + right / 2}" y="14">{escape(value)}</text>
</g>
</svg>
"""


# ---------------------------------------------------------------------- the API page


def api_page(root: Path) -> str:
    """The functions that ``import nnssl_plugin`` offers, from their signatures and docstrings."""
    parts = [API_HEAD]
    for name, dotted in FUNCTIONS.items():
        parts.append(_function(f"nnssl.{name}", find_definition(root, dotted)))
    for dotted in CLASSES:
        parts += _class(find_definition(root, dotted))
    return "\n".join(parts)


def find_definition(root: Path, dotted: str) -> Any:
    """The syntax tree of a function or class, read without importing it.

    Raises:
        LookupError: where its module does not define it.
    """
    module, _, name = dotted.rpartition(".")
    tree = ast.parse((root / Path(*module.split("."))).with_suffix(".py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    raise LookupError(f"{module} defines no {name}")


def _function(name: str, node: ast.FunctionDef) -> str:
    signature, text = _signature(name, node), _markdown(ast.get_docstring(node))
    return f"## {name.rpartition('.')[2]}\n\n```python\n{signature}\n```\n\n{text}\n"


def _class(node: ast.ClassDef) -> Iterator[str]:
    yield f"## {node.name}\n\n{_markdown(ast.get_docstring(node))}\n"
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_") or not ast.get_docstring(member):
            continue
        if any(isinstance(each, ast.Name) and each.id == "property" for each in member.decorator_list):
            yield f"**`{member.name}`**: {_markdown(ast.get_docstring(member))}\n"
        else:
            yield f"### {node.name}.{member.name}\n\n```python\n{_signature(member.name, member)}\n```\n\n" + (
                f"{_markdown(ast.get_docstring(member))}\n"
            )


def _signature(name: str, node: ast.FunctionDef) -> str:
    """On one line where it fits, else an argument per line."""
    arguments = node.args
    arguments.args = [argument for argument in arguments.args if argument.arg != "self"]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parts = [_spaced(part) for part in _split_arguments(ast.unparse(arguments))]
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return line
    inside = ",\n".join(f"    {part}" for part in parts)
    return f"{name}(\n{inside},\n){returns}"


def _split_arguments(text: str) -> list[str]:
    """At the commas that stand outside of all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _spaced(argument: str) -> str:
    """``a: int=2`` as it is written by hand: ``a: int = 2``."""
    named, equals, default = argument.partition("=")
    return f"{named} = {default}" if equals and ":" in named else argument


SECTIONS = ("Args", "Returns", "Raises")


def _markdown(docstring: str | None) -> str:
    """A docstring in Google's style as Markdown: sections in bold, arguments as a list, roles and literals as code."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", docstring or "").replace("``", "`")
    paragraphs = re.split(rf"(?m)^({'|'.join(SECTIONS)}):\n", text)
    lines = [_flowing(paragraphs[0])]
    for title, body in zip(paragraphs[1::2], paragraphs[2::2], strict=True):
        lines.append(f"**{title}**\n\n{_entries(body) if title != 'Returns' else _flowing(textwrap.dedent(body))}")
    return "\n\n".join(lines)


def _flowing(text: str) -> str:
    """Paragraphs on a line each; the asterisks of ``*spatial`` are no emphasis."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
    return "\n\n".join(re.sub(r"\*(?=\w)", r"\\*", paragraph) for paragraph in paragraphs)


def _entries(body: str) -> str:
    entries = re.split(r"(?m)^(?=\w[\w ,]*: )", textwrap.dedent(body).strip())
    named = (" ".join(entry.split()).partition(": ") for entry in entries if entry.strip())
    return "\n".join(f"- `{name}`: {said}" for name, _, said in named)


def main() -> None:
    """Write every page that has changed."""
    for path, text in generated().items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
