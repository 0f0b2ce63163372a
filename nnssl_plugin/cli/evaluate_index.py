"""``evaluate retrieval`` and ``evaluate probe``: what the vectors of an index are good for."""

RETRIEVAL = """Measure retrieval in an index of embeddings, or in several beside one another.

    nnssl_plugin evaluate retrieval --index INDEX --by diagnosis --by subject -o retrieval
    nnssl_plugin evaluate retrieval --index mae=INDEX_1 untrained=INDEX_2 --by findings:any -o retrieval
    nnssl_plugin evaluate retrieval --index INDEX --by subject --queries modality=PET --gallery modality=CT -o retrieval

--by says what is right for a query: COLUMN (equal cells), COLUMN:any (one shared label of several, a;b),
COLUMN:exact (the same labels), COLUMN:within=1.5 (a number at most 1.5 times as large or small), or subject (another
case of the same subject). But for the last, rows of the query's subject are never found. Equal distances count against
the query. Writes retrieval.json, queries.csv and retrieval.png; intervals draw subjects.
"""

PROBE = """Predict a column of an index from its vectors: nearest neighbours, and a linear classifier.

    nnssl_plugin evaluate probe --index mae=INDEX_1 untrained=INDEX_2 --target diagnosis -o probe.json

Folds are stratified by class and grouped by subject; accuracy, macro F1 and AUROC of all folds together, with intervals
over subjects.
"""


def add_index_kinds(kinds):
    import argparse

    kind = kinds.add_parser(
        "retrieval",
        help="do images find those of their kind?",
        description=RETRIEVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind.add_argument("--index", required=True, nargs="+", metavar="[NAME=]INDEX", help="folders that embed wrote")
    kind.add_argument("--by", required=True, action="append", metavar="RULE", help="what is right for a query")
    kind.add_argument("-o", required=True, metavar="DIR", help="folder of the results")
    for flag, said in (("--queries", "rows that are queries"), ("--gallery", "rows that may be found")):
        kind.add_argument(flag, action="append", default=[], metavar="COLUMN=VALUE", help=f"{said} (default: all)")
    kind = kinds.add_parser(
        "probe",
        help="do vectors tell a class?",
        description=PROBE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind.add_argument("--index", required=True, nargs="+", metavar="[NAME=]INDEX", help="folders that embed wrote")
    kind.add_argument("--target", required=True, metavar="COLUMN", help="column to predict")
    kind.add_argument("-o", metavar="FILE", help="JSON file for the numbers")
    kind.add_argument("--folds", type=int, default=5, metavar="N", help="default: 5")
    kind.add_argument("--neighbours", type=int, default=10, metavar="N", help="default: 10")


def _retrieval(args):
    from nnssl_plugin.tasks.retrieval.evaluation import evaluate_retrieval, table_of

    found = evaluate_retrieval(_named(args.index), args.o, args.by, queries=args.queries, gallery=args.gallery)
    print(table_of(found.results))
    print(f"\nWritten to {found.folder}")


def _probe(args):
    from nnssl_plugin.tasks.retrieval.probe import evaluate_probe, probe_table

    found = evaluate_probe(_named(args.index), args.target, output=args.o, folds=args.folds, neighbours=args.neighbours)
    print(probe_table(found))


def _named(given):
    """Name → folder; a folder without a name has its own."""
    from pathlib import Path

    from nnssl_plugin.errors import UserError

    places = {}
    for text in given:
        name, _, place = text.rpartition("=")
        name = name or Path(place).name
        if name in places:
            raise UserError(f"Two indexes are called '{name}'.", f"Give each a name: --index a={place} b=…")
        places[name] = place
    return places


INDEX_KINDS = {"retrieval": _retrieval, "probe": _probe}
