"""``evaluate retrieval`` and ``evaluate probe``: what vectors and maps of an encoder are good for."""

RETRIEVAL = """Measure retrieval in an index of embeddings, or in several beside one another.

    nnssl_plugin evaluate retrieval --index INDEX --by diagnosis --by subject -o retrieval
    nnssl_plugin evaluate retrieval --index mae=INDEX_1 untrained=INDEX_2 --by findings:any -o retrieval
    nnssl_plugin evaluate retrieval --index INDEX --by subject --queries modality=PET --gallery modality=CT -o retrieval

--by says what is right for a query: COLUMN (equal cells), COLUMN:any (one shared label of several, a;b),
COLUMN:exact (the same labels), COLUMN:within=1.5 (a number at most 1.5 times as large or small), or subject (another
case of the same subject). But for the last, rows of the query's subject are never found. Equal distances count against
the query. Writes retrieval.json, queries.csv and retrieval.png; intervals draw subjects.
"""

PROBE = """What can be read from frozen features? Structures in images, or a column of an index of embeddings.

    nnssl_plugin evaluate probe -d 502 -w mae=CHECKPOINT_1 s2dc=CHECKPOINT_2 -f 0 -o probe.json
    nnssl_plugin evaluate probe -d 502 -w CHECKPOINT -f 0 --labelled 5 --seeds 0 1 2
    nnssl_plugin evaluate probe --index mae=INDEX_1 untrained=INDEX_2 --target diagnosis -o probe.json

With -d: a ridge regression of each voxel's class on the maps of all stages of the encoder is fitted to the labels of
the fold's training cases, in closed form; Dice is that of its whole validation cases, beside a random encoder and
labels that are shuffled. No schedule, no learning rate, seconds to minutes.

With --index: nearest neighbours and a linear classifier on the vectors. Folds are stratified by class and grouped by
subject; accuracy, macro F1 and AUROC of all folds together, with intervals over subjects.
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
        help="what can be read from frozen features?",
        description=PROBE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    images = kind.add_argument_group("structures in images")
    images.add_argument("-d", metavar="ID", help="labelled, preprocessed dataset")
    images.add_argument("-w", nargs="+", metavar="[NAME=]FILE", help="checkpoints or other weights to compare")
    images.add_argument("-f", type=int, metavar="FOLD", help="fold of splits_final.json")
    images.add_argument("-p", default="nnUNetPlans", metavar="PLAN", help="plan of the network (default: nnUNetPlans)")
    images.add_argument("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    images.add_argument("--labelled", type=int, metavar="N", help="draw so many training cases (default: all)")
    images.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the draws, one each (default: 0)"
    )
    images.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    vectors = kind.add_argument_group("a column of an index")
    vectors.add_argument("--index", nargs="+", metavar="[NAME=]INDEX", help="folders that embed wrote")
    vectors.add_argument("--target", metavar="COLUMN", help="column to predict")
    vectors.add_argument("--folds", type=int, default=5, metavar="N", help="default: 5")
    vectors.add_argument("--neighbours", type=int, default=10, metavar="N", help="default: 10")
    kind.add_argument("-o", metavar="FILE", help="JSON file for the numbers")


def _retrieval(args):
    from nnssl_plugin.tasks.retrieval.evaluation import evaluate_retrieval, table_of

    found = evaluate_retrieval(_named(args.index), args.o, args.by, queries=args.queries, gallery=args.gallery)
    print(table_of(found.results))
    print(f"\nWritten to {found.folder}")


def _probe(args):
    from nnssl_plugin.errors import UserError

    of_images = args.d is not None and args.w is not None and args.f is not None
    of_vectors = args.index is not None and args.target is not None
    if of_images == of_vectors:
        raise UserError(
            "It is not clear what is to be read: structures in images, or a column of an index.",
            "Give either -d ID -w CHECKPOINT -f FOLD, or --index INDEX --target COLUMN.",
        )
    (_probe_images if of_images else _probe_vectors)(args)


def _probe_images(args):
    from nnssl_plugin.io.files import write_json
    from nnssl_plugin.tasks.probing.probe import evaluate_voxels, names_of, voxel_table

    result = evaluate_voxels(
        args.d,
        args.p,
        names_of(args.w),
        fold=args.f,
        configuration=args.c,
        labelled=args.labelled,
        seeds=args.seeds,
        device=args.device,
        tell=print,
    )
    if args.o:
        write_json(args.o, result)
    print(voxel_table(result))


def _probe_vectors(args):
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
