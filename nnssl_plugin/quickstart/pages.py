"""Pieces of an HTML page that stands alone: every text is escaped here, every picture is part of the file."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 62rem;
       padding: 1rem 1.5rem 3rem; }
h1 { font-size: 1.7rem; margin: 1rem 0 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
p.result { font-size: 1.1rem; font-weight: 600; }
p.honest { background: #fff6dc; border-left: 4px solid #b07a00; padding: .6rem .9rem; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
caption { text-align: left; color: #444; padding-bottom: .3rem; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #666; }
td { font-variant-numeric: tabular-nums; }
figure { margin: .8rem 0; }
figcaption { color: #444; font-size: .95rem; }
img { max-width: 100%; height: auto; }
.row { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; }
.row figure { flex: 1 1 22rem; margin: 0; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3rem; color: #555; font-size: .9rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  figure, tr, p { break-inside: avoid; }
  h2, caption, section > p { break-after: avoid; }
  table { display: table; width: 100%; font-size: 8.5pt; }
  th, td { padding: .15rem .3rem; }
  .row { display: block; }
  .row figure { display: inline-block; width: 48%; margin: 0 0 .6rem; vertical-align: top; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""


def page(title: str, sections: Sequence[str], footer: str) -> str:
    """A whole document of finished sections."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(sections)
        + f"\n</main>\n<footer>{html.escape(footer)}</footer>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section of finished parts; no heading where it is empty."""
    return "\n".join(["<section>", *([f"<h2>{html.escape(heading)}</h2>"] if heading else []), *parts, "</section>"])


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph, with a class of the style sheet."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def bullets(heading: str, items: Sequence[str]) -> str:
    """A list under a line of text."""
    lines = "\n".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<p>{html.escape(heading)}:</p>\n<ul>\n{lines}\n</ul>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row and first column are headers."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f"<table>\n<caption>{html.escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )


def figure(path: Path, alt: str, caption: str) -> str:
    """A PNG inside the page, with its text for those who cannot see it."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    below = f"\n<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure>\n<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">{below}\n</figure>'


def side_by_side(figures: Sequence[str]) -> str:
    """Finished figures in rows, as many as fit."""
    return "\n".join(['<div class="row">', *figures, "</div>"])


def code(lines: str) -> str:
    """Commands as they are typed."""
    return f"<pre><code>{html.escape(lines)}</code></pre>"


def folded(summary: str, *parts: str) -> str:
    """Finished parts that a click opens."""
    return "\n".join([f"<details>\n<summary>{html.escape(summary)}</summary>", *parts, "</details>"])
