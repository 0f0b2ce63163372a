"""How good retrieval is: every query of an index against a gallery, by one or several rules of relevance."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, write_json
from nnssl_plugin.statistics.ranking import expected_by_chance, query_metrics, summarise_queries
from nnssl_plugin.tasks.retrieval.index import Index, load_index
from nnssl_plugin.tasks.retrieval.relevance import Rule, parse_rule

MOST_SCORES = 2**22
"""Scores that are ordered at once (32 MiB each of scores, ranks and gains)."""
SUMMARY_FILE, QUERIES_FILE, FIGURE_FILE = "retrieval.json", "queries.csv", "retrieval.png"
SHOWN = ("recall@1", "recall@5", "recall@10", "map", "ndcg", "median_rank", "mean_rank_top10_paper")
"""Metrics of the printed table."""


@dataclass(frozen=True)
class RetrievalEvaluation:
    """What was measured."""

    results: dict[str, dict[str, dict[str, Any]]]
    """Index → rule → ``queries``, ``gallery``, ``without_relevant``, ``without_label``, ``metrics`` and ``chance``."""
    folder: Path


def evaluate_retrieval(
    indexes: Mapping[str, str | Path],
    output: str | Path,
    by: Sequence[str],
    *,
    queries: Sequence[str] = (),
    gallery: Sequence[str] = (),
    samples: int = 2000,
    seed: int = 0,
) -> RetrievalEvaluation:
    """Measure retrieval in each index, and write ``retrieval.json``, ``queries.csv`` and a figure.

    A query finds neither itself nor, but where the subject is what is looked for, its subject's rows. Queries for which
    nothing in the gallery is right are counted and left out of every number.

    Args:
        indexes: name → folder.
        output: folder of the results.
        by: rules of relevance, see ``relevance``.
        queries: conditions (``modality=PET``) for rows that are queries; none: all rows.
        gallery: conditions for rows that may be found; none: all rows.
        samples: draws of the bootstrap over subjects.
        seed: of the draws.

    Raises:
        UserError: a column is absent, or no query is left.
    """
    rules = [parse_rule(text) for text in by]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    lines: list[dict[str, Any]] = []
    for name, folder in indexes.items():
        index = load_index(folder)
        asked, found = index.chosen(queries), index.chosen(gallery)
        results[name] = {}
        for rule in rules:
            result, of_queries = _evaluate(index, rule, asked, found, samples=samples, seed=seed)
            results[name][rule.text] = result
            lines += [{"index": name, "by": rule.text, **line} for line in of_queries]
    output = Path(output)
    write_json(
        output / SUMMARY_FILE,
        {
            "indexes": {name: load_index(folder).store.facts["encoder"] for name, folder in indexes.items()},
            "queries": list(queries),
            "gallery": list(gallery),
            "results": results,
        },
    )
    _write_queries(output / QUERIES_FILE, lines)
    from nnssl_plugin.tasks.retrieval.figure import draw_retrieval

    draw_retrieval(output / FIGURE_FILE, results)
    return RetrievalEvaluation(results, output)


def table_of(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line per rule and index, after a line of chance."""
    lines = []
    width = max(len(name) for name in (*results, "chance")) + 2
    for rule in next(iter(results.values())):
        first = next(iter(results.values()))[rule]
        lines += [
            f"{rule}: {first['queries']} queries, gallery of {first['gallery']}"
            + (
                f"; {first['without_relevant']} queries without a right answer left out"
                * bool(first["without_relevant"])
            ),
            " " * width + "".join(f"{_short(metric):>13}" for metric in SHOWN),
            f"{'chance':<{width}}" + "".join(f"{_number(first['chance'].get(metric)):>13}" for metric in SHOWN),
        ]
        for name, of_rules in results.items():
            values = (of_rules[rule]["metrics"][metric]["value"] for metric in SHOWN)
            lines.append(f"{name:<{width}}" + "".join(f"{_number(value):>13}" for value in values))
        lines.append("")
    return "\n".join(lines).rstrip()


def _evaluate(index: Index, rule: Rule, asked: np.ndarray, found: np.ndarray, *, samples: int, seed: int):
    """The result of a rule, and a line per query."""
    cells, subjects, cases = index.column(rule.column), index.column("subject"), index.column("case")
    known = rule.known(cells)
    asking, gallery = np.flatnonzero(asked & known), np.flatnonzero(found & known)
    if not len(asking) or not len(gallery):
        raise UserError(
            f"{index.store.folder}: by '{rule.text}' there are {len(asking)} queries and a gallery of {len(gallery)}.",
            f"Look at the columns of {index.store.table_file} and at the conditions.",
        )
    own = cases if rule.of_subjects else subjects
    parts: list[dict[str, np.ndarray]] = []
    counts: list[np.ndarray] = []
    step = max(1, MOST_SCORES // len(gallery))
    for start in range(0, len(asking), step):
        rows = asking[start : start + step]
        scores = _cosines(index, rows, gallery)
        among = own[rows][:, None] != own[gallery][None]
        right = rule.right(cells[rows], cells[gallery]) & among
        parts.append(query_metrics(scores, right, among))
        counts.append(np.stack((among.sum(1), right.sum(1))))
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    candidates, relevant = np.concatenate(counts, axis=1)
    if not (relevant > 0).any():
        raise UserError(
            f"{index.store.folder}: by '{rule.text}' nothing in the gallery is right for any query.",
            "Rows of the query's own subject never count, but for --by subject.",
        )
    result = {
        "queries": int((relevant > 0).sum()),
        "gallery": len(gallery),
        "without_relevant": int((relevant == 0).sum()),
        "without_label": int((asked & ~known).sum()),
        "metrics": summarise_queries(values, list(subjects[asking]), samples=samples, seed=seed),
        "chance": _chance(candidates, relevant),
    }
    lines = [
        {"case": cases[row], "part": index.table[row]["part"], "subject": subjects[row]}
        | {"relevant": int(relevant[place])}
        | {name: value[place] for name, value in values.items()}
        for place, row in enumerate(asking)
    ]
    return result, lines


def _cosines(index: Index, rows: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(queries, gallery), from vectors of any number, a block at a time."""
    queries = index.standardise(index.vectors[rows])
    blocks = [gallery[start : start + 4096] for start in range(0, len(gallery), 4096)]
    return np.concatenate([queries @ index.standardise(index.vectors[block]).T for block in blocks], axis=1)


def _chance(candidates: np.ndarray, relevant: np.ndarray) -> dict[str, float | None]:
    chance = expected_by_chance(candidates, relevant)
    return {"map" if name == "average_precision" else name: value for name, value in chance.items()}


def _write_queries(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    written = StringIO(newline="")
    writer = csv.DictWriter(written, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({key: _cell(value) for key, value in line.items()})
    with atomic_path(path) as temporary:
        temporary.write_text(written.getvalue(), encoding="utf-8", newline="")


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.6g}"
    return str(value)


def _short(metric: str) -> str:
    return {"mean_rank_top10_paper": "MnR (paper)", "median_rank": "median rank", "map": "mAP", "ndcg": "nDCG"}.get(
        metric, metric
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
