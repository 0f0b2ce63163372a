"""Score predictions, compare runs case by case, and measure what features tell apart.

    nnssl_plugin evaluate segmentation -i scratch=RESULTS_1 med3d=RESULTS_2 -o comparison
    nnssl_plugin evaluate segmentation -i test=predictions -ref nnUNet_raw/Dataset007_X/labelsTs -o scores

A run is a folder of predictions, a fold_X/validation folder, or a trainer's result folder, whose folds are pooled.
Writes scores.csv, NAME/summary.json per run, and with two or more runs comparison.json and comparison.png: every run
against the first, paired by case. Distances are in mm.

    nnssl_plugin evaluate tokens -d 502 -p nnUNetPlans -w checkpoint_final.pth --stride 16 -o tokens.json

compares the features of a pretrained network with those of its random initialisation: how alike are tokens of one
label, how different those of different labels? The dataset needs labels of structures.
"""


def add_arguments(parser):
    import argparse

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    kind = kinds.add_parser("segmentation", help="Dice, HD95 and normalised surface distance per case and label",
                            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind.add_argument("-i", required=True, nargs="+", metavar="NAME=DIR", help="runs; the first is compared to")
    kind.add_argument("-o", required=True, metavar="DIR", help="folder of the results")
    kind.add_argument("-ref", metavar="DIR", help="references (default for results: nnU-Net's gt_segmentations)")
    kind.add_argument("-djfile", metavar="FILE", help="dataset.json that defines the labels (default: beside the runs)")
    kind.add_argument("-f", nargs="+", type=int, metavar="FOLD", help="folds to pool of result folders (default: all)")
    kind.add_argument("--tolerance-mm", type=float, default=1.0, metavar="MM",
                      help="surface distance that counts as no error in NSD (default: 1.0)")
    kind.add_argument("-np", type=int, default=2, metavar="N", help="worker processes (default: 2)")
    kind.set_defaults(evaluate=_segmentation)
    kind = kinds.add_parser("tokens", help="do pretrained features tell the labels of a dataset apart?",
                            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind.add_argument("-d", required=True, metavar="ID", help="labelled, preprocessed dataset")
    kind.add_argument("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    kind.add_argument("-p", default="nnUNetPlans", metavar="PLAN", help="plan of the network (default: nnUNetPlans)")
    kind.add_argument("-w", metavar="FILE", help="weights (default: the random initialisation alone)")
    kind.add_argument("-f", type=int, metavar="FOLD", help="only the validation cases of this fold (default: all)")
    kind.add_argument("--stride", type=int, default=16, metavar="VOXELS",
                      help="size of a token: the finest stage with at least this stride (default: 16)")
    kind.add_argument("--cases", type=int, metavar="N", help="how many cases (default: all)")
    kind.add_argument("-o", metavar="FILE", help="JSON file for the numbers")
    kind.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    kind.set_defaults(evaluate=_tokens)


def run(args):
    return args.evaluate(args)


def _tokens(args):
    from nnssl_plugin.evaluation.probes import evaluate_tokens, table
    from nnssl_plugin.files import write_json

    result = evaluate_tokens(args.d, args.p, configuration=args.c, weights=args.w, fold=args.f, cases=args.cases,
                             stride=args.stride, device=args.device)
    if args.o:
        write_json(args.o, result)
    print(table(result))


def _segmentation(args):
    from nnssl_plugin.evaluation.segmentation import evaluate_segmentation
    from nnssl_plugin.evaluation.summaries import table

    evaluation = evaluate_segmentation(
        _named_folders(args.i), args.o, references=args.ref, dataset_json=args.djfile, folds=args.f,
        tolerance_mm=args.tolerance_mm, processes=args.np,
    )
    print(table(evaluation.summaries, evaluation.comparison))
    for found in evaluation.runs:
        if found.missing:
            print(f"\n{found.name}: {len(found.missing)} cases were not predicted and count nowhere: "
                  f"{', '.join(found.missing)}")
    print(f"\nWritten to {evaluation.folder}")


def _named_folders(given: list[str]) -> dict[str, str]:
    from nnssl_plugin.errors import UserError

    folders = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or not folder:
            raise UserError(f"'{text}' is not NAME=DIR.", f"For example: -i scratch={folder or name}")
        if name in folders:
            raise UserError(f"Two runs are called '{name}'.", "Give each run a name of its own.")
        folders[name] = folder
    return folders
