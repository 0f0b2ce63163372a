"""List the pretraining methods: trainer, what each pretrains, what it needs, its presets, its paper.

nnssl_plugin methods
nnssl_plugin methods --json methods.json
"""

COLUMNS = ("method", "trainer", "pretrains", "needs", "plans", "presets")


def add_arguments(parser):
    parser.add_argument("--json", metavar="FILE", help="write every field of the registry instead; - prints it")


def run(args):
    import json

    from nnssl_plugin.io.files import write_json
    from nnssl_plugin.registry import METHODS

    if args.json is None:
        print(table(METHODS))
        return
    content = as_json(METHODS)
    if args.json == "-":
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        write_json(args.json, content)
        print(f"wrote {args.json}")


def table(methods) -> str:
    """A row for each method, in columns as wide as their longest entry, and the papers below."""
    rows = [COLUMNS, *(_row(name, method) for name, method in methods.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    papers = [f"{method.title}: {method.paper.authors[0]} et al., {method.paper.title}" for method in methods.values()]
    return "\n".join([*lines, "", *papers])


def as_json(methods) -> dict:
    """Name → the fields of the registry, and the name that ``-tr`` takes."""
    from dataclasses import asdict

    return {name: {**asdict(method), "trainer_name": method.trainer_name} for name, method in methods.items()}


def _row(name, method) -> tuple[str, ...]:
    return (
        name,
        method.trainer_name,
        ", ".join(method.trains),
        method.needs.replace("`", "") or "scans alone",
        ", ".join(f"{count}D" for count in method.dimensions),
        ", ".join(method.presets),
    )
