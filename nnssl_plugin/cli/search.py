"""Find the images of an index that are most like yours.

    nnssl_plugin search --index INDEX -q scan.nii.gz -o neighbours
    nnssl_plugin search --index INDEX -q CASE_017 -k 5 --where "modality=CT" --approximate
    nnssl_plugin search --index INDEX --text "a large tumour in the left thigh"

A query is an image file, read by the model that made the index (or -m), or the name of a case in the index. A subject
does not find itself, unless --same-subject. -o DIR takes neighbours.json and a contact sheet, neighbours.png and
neighbours.html: each query with what is nearest to it, with the distance 1 - cosine. --text needs an index that embed
--aligned made; its distance is the one that the pretraining learned.
"""


def add_arguments(parser):
    parser.add_argument("--index", required=True, metavar="INDEX", help="folder that embed wrote")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument("-q", nargs="+", metavar="IMAGE", help="image files, or cases of the index")
    queries.add_argument("--text", nargs="+", metavar="TEXT", help="texts, for an index of embed --aligned")
    parser.add_argument("--pair", metavar="WHERE", help="encoders of the texts (default: where clip left them)")
    parser.add_argument("--pair-model", metavar="NAME", help="open_clip's architecture of a file or tag")
    parser.add_argument("-m", metavar="MODEL", help="its encoder (default: the file that made the index)")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="neighbours (default: 10)")
    parser.add_argument("-o", metavar="DIR", help="folder for the answers as JSON, PNG and HTML")
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only such rows; also COLUMN!=VALUE"
    )
    parser.add_argument("--subject", metavar="NAME", help="whose images the queries are")
    parser.add_argument("--same-subject", action="store_true", help="let a subject find itself")
    parser.add_argument("--approximate", action="store_true", help="by FAISS (extra retrieval), for large indexes")
    parser.add_argument("-seg", metavar="DIR", help="segmentations of the queries, for an index of lesions")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: cpu")
    parser.add_argument("--trust", action="store_true", help="build a network of any class; see embed")


def run(args):
    from pathlib import Path

    from nnssl_plugin.io.files import write_json
    from nnssl_plugin.tasks.retrieval.contact_sheet import write_sheets
    from nnssl_plugin.tasks.retrieval.index import load_index
    from nnssl_plugin.tasks.retrieval.queries import answers, table_of

    index = load_index(args.index)
    among = index.chosen(args.where) if args.where else None
    queries, found = (_by_text if args.text else _by_image)(args, index, among)
    answered = answers(index, queries, found)
    print(table_of(answered))
    if args.o:
        folder = Path(args.o)
        write_json(folder / "neighbours.json", {"index": str(Path(args.index).resolve()), "queries": answered})
        sheets = write_sheets(folder, queries, answered, reader=index.store.facts["made"]["reader"])
        print("Written to", folder / "neighbours.json", *sheets, sep="\n  ")


def _by_image(args, index, among):
    import numpy as np

    from nnssl_plugin.cli.embed import alignment_of
    from nnssl_plugin.tasks.retrieval.queries import queries_of

    queries = queries_of(
        args.q,
        index,
        model=args.m,
        subject=args.subject,
        segmentations=args.seg,
        device=args.device,
        trust=args.trust,
        alignments=alignment_of,
    )
    found = (_approximate(index) if args.approximate else index).search(
        np.stack([query.vector for query in queries]),
        args.k,
        among=among,
        subjects=None if args.same_subject else [query.subject for query in queries],
    )
    return queries, found


def _by_text(args, index, among):
    from nnssl_plugin.errors import UserError
    from nnssl_plugin.tasks.retrieval.texts import search_texts, text_queries

    if args.approximate:
        raise UserError(
            "Texts are compared with every row: there are no approximate neighbours of a text.",
            "Leave --approximate out.",
        )
    queries = text_queries(args.text, index, weights=args.pair, model=args.pair_model)
    return queries, search_texts(index, queries, args.k, among=among)


def _approximate(index):
    from nnssl_plugin.tasks.retrieval.approximate import load_approximate

    approximate, built = load_approximate(index)
    facts = approximate.facts
    if built:
        print(
            f"Built approximate neighbours ({facts['kind']}) of {facts['rows']} vectors: recall@10 against exact "
            f"search {facts['recall']:.3f}."
        )
    return approximate
