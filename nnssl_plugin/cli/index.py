"""Describe an index of embeddings, add images to it, or remove cases.

    nnssl_plugin index info --index INDEX
    nnssl_plugin index add --index INDEX -i MORE_IMAGES --metadata patients.csv
    nnssl_plugin index remove --index INDEX --where "subject=p017"

Adding takes the model that made the index, or -m where it has moved; another encoder is refused. Every change is there
as a whole or not at all, and two processes cannot change one index at a time.
"""

from nnssl_plugin.cli.embed import add_image_arguments, alignment_of, embed


def add_arguments(parser):
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    info = kinds.add_parser("info", help="what is in it, and what made it")
    add = kinds.add_parser("add", help="embed more images into it")
    add.add_argument("-m", metavar="MODEL", help="its encoder (default: the file that made the index)")
    add_image_arguments(add)
    remove = kinds.add_parser("remove", help="take rows out of it")
    remove.add_argument(
        "--where", action="append", required=True, metavar="COLUMN=VALUE", help="rows that go; also COLUMN!=VALUE"
    )
    for kind in (info, add, remove):
        kind.add_argument("--index", required=True, metavar="INDEX", help="folder that embed wrote")


def run(args):
    return {"info": _info, "add": _add, "remove": _remove}[args.kind](args)


def _info(args):
    from nnssl_plugin.data.vector_store import VectorStore

    store = VectorStore(args.index)
    table, encoder, made = store.table(), store.facts["encoder"], store.facts["made"]
    cases, subjects = ({row[name] for row in table} for name in ("case", "subject"))
    state = "finished" if store.facts["frozen"] else "not finished: run the same embed again"
    print(f"{store.folder}: {store.rows} vectors of {store.dimensions} numbers, {state}")
    print(f"{len(cases)} cases of {len(subjects)} subjects; columns: {', '.join(store.facts['columns'])}")
    print(f"rows: one per {encoder['rows_are']}, view: {encoder['view']}")
    print(f"encoder: {encoder['network']}, method {encoder['method'] or 'unknown'}, {encoder['weights']}'s weights")
    print(f"vector: {' + '.join(encoder['parts'])}; patch {encoder['patch_size']}, spacing {encoder['spacing_mm']} mm")
    if "alignment" in store.facts:
        print(f"texts: {store.facts['alignment']['weights']}")
    print(f"model: {made['model']}\nencoder's SHA-256: {encoder['encoder_sha256']}")


def _add(args):
    from nnssl_plugin.data.vector_store import VectorStore

    facts = VectorStore(args.index).facts
    how = {"rows": facts["encoder"]["rows_are"], "view": facts["encoder"]["view"], "new": False}
    if "alignment" in facts:
        how["alignments"] = alignment_of
    return embed(args, args.m or facts["made"]["model"], args.index, **how)


def _remove(args):
    from nnssl_plugin.data.vector_store import writing
    from nnssl_plugin.tasks.retrieval.index import rows_where

    with writing(args.index) as store:
        gone = rows_where(store, store.table(), args.where)
        if gone.any():
            store.remove(~gone)
        print(f"{store.folder}: {int(gone.sum())} vectors removed, {store.rows} left.")
