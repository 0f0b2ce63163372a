"""Score predictions, compare runs case by case, and measure what features tell apart.

    nnssl_plugin evaluate segmentation -i scratch=RESULTS_1 med3d=RESULTS_2 -o comparison
    nnssl_plugin evaluate classification -d 12 -p nnUNetPlans-med3d -c 3d_fullres -f 0 1 2 3 4
    nnssl_plugin evaluate tokens -d 502 -p nnUNetPlans -w checkpoint_final.pth --stride 16 -o tokens.json
    nnssl_plugin evaluate retrieval --index mae=INDEX_1 untrained=INDEX_2 --by diagnosis -o retrieval
    nnssl_plugin evaluate probe --index mae=INDEX_1 untrained=INDEX_2 --target diagnosis

`nnssl_plugin evaluate KIND --help` says what is read and written.
"""

from argparse import RawDescriptionHelpFormatter

from nnssl_plugin.cli.evaluate_index import INDEX_KINDS, add_index_kinds

SEGMENTATION = """Score segmentations, and compare runs case by case.

    nnssl_plugin evaluate segmentation -i scratch=RESULTS_1 med3d=RESULTS_2 -o comparison
    nnssl_plugin evaluate segmentation -i test=predictions -ref nnUNet_raw/Dataset007_X/labelsTs -o scores

A run is a folder of predictions, a fold_X/validation folder, or a trainer's result folder, whose folds are pooled.
Writes scores.csv, NAME/summary.json per run, and with two or more runs comparison.json and comparison.png: every run
against the first, paired by case, with intervals over subjects. Distances are in mm.
"""

TOKENS = """Do pretrained features tell the labels of a dataset apart?

    nnssl_plugin evaluate tokens -d 502 -p nnUNetPlans -w checkpoint_final.pth --stride 16 -o tokens.json

Compares the features of a pretrained network with those of its random initialisation: how alike are tokens of one
label, how different those of different labels? The dataset needs labels of structures.
"""

CLASSIFICATION = """Pool the folds of classifiers, score tables of predictions, and compare runs subject by subject.

    nnssl_plugin evaluate classification -d 12 -p nnUNetPlans-med3d -c 3d_fullres -f 0 1 2 3 4
    nnssl_plugin evaluate classification -d 12 -p nnUNetPlans-scratch nnUNetPlans-med3d -c 3d_fullres -o comparison
    nnssl_plugin evaluate classification -i test=predictions.csv -ref test_labels.csv -o scores

The first writes crossval_results_folds_0_1_2_3_4 into the model folder: predictions.csv, summary.json with intervals
over subjects, and figures. With several plans, trainers or configurations every run is compared with the first
(comparison.json, comparison.png). -i takes model folders, fold folders, and what `classify` wrote.
"""


def add_arguments(parser):
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (_add_segmentation, _add_tokens, _add_classification, add_index_kinds):
        add(kinds)


def _add_segmentation(kinds):
    kind = kinds.add_parser(
        "segmentation",
        help="Dice, HD95 and normalised surface distance per case and label",
        description=SEGMENTATION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    kind.add_argument("-i", required=True, nargs="+", metavar="NAME=DIR", help="runs; the first is compared to")
    kind.add_argument("-o", required=True, metavar="DIR", help="folder of the results")
    kind.add_argument("-ref", metavar="DIR", help="references (default for results: nnU-Net's gt_segmentations)")
    kind.add_argument("-djfile", metavar="FILE", help="dataset.json that defines the labels (default: beside the runs)")
    kind.add_argument("-f", nargs="+", type=int, metavar="FOLD", help="folds to pool of result folders (default: all)")
    kind.add_argument(
        "--tolerance-mm",
        type=float,
        default=1.0,
        metavar="MM",
        help="surface distance that counts as no error in NSD (default: 1.0)",
    )
    kind.add_argument(
        "--subjects", metavar="FILE", help="table case,subject (default: the dataset's classification.csv, if any)"
    )
    kind.add_argument("-np", type=int, default=2, metavar="N", help="worker processes (default: 2)")


def _add_tokens(kinds):
    kind = kinds.add_parser(
        "tokens",
        help="do pretrained features tell the labels of a dataset apart?",
        description=TOKENS,
        formatter_class=RawDescriptionHelpFormatter,
    )
    kind.add_argument("-d", required=True, metavar="ID", help="labelled, preprocessed dataset")
    kind.add_argument("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    kind.add_argument("-p", default="nnUNetPlans", metavar="PLAN", help="plan of the network (default: nnUNetPlans)")
    kind.add_argument("-w", metavar="FILE", help="weights (default: the random initialisation alone)")
    kind.add_argument("-f", type=int, metavar="FOLD", help="only the validation cases of this fold (default: all)")
    kind.add_argument(
        "--stride",
        type=int,
        default=16,
        metavar="VOXELS",
        help="size of a token: the finest stage with at least this stride (default: 16)",
    )
    kind.add_argument("--cases", type=int, metavar="N", help="how many cases (default: all)")
    kind.add_argument("-o", metavar="FILE", help="JSON file for the numbers")
    kind.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")


def _add_classification(kinds):
    kind = kinds.add_parser(
        "classification",
        help="AUROC, accuracy and calibration of the folds together",
        description=CLASSIFICATION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    runs = kind.add_mutually_exclusive_group(required=True)
    runs.add_argument("-d", metavar="ID", help="dataset ID or full name of the trainings")
    runs.add_argument("-i", nargs="+", metavar="NAME=PATH", help="runs; the first is compared to")
    kind.add_argument(
        "-tr",
        nargs="+",
        default=["PretrainedClassificationTrainer"],
        metavar="TRAINER",
        help="default: PretrainedClassificationTrainer",
    )
    kind.add_argument("-p", nargs="+", default=["nnUNetPlans"], metavar="PLANS", help="default: nnUNetPlans")
    kind.add_argument("-c", nargs="+", default=["3d_fullres"], metavar="CONFIG", help="default: 3d_fullres")
    kind.add_argument("-f", nargs="+", type=int, metavar="FOLD", help="folds to pool (default: all that are trained)")
    kind.add_argument("-o", metavar="DIR", help="folder of the results (not needed to pool the folds of one training)")
    kind.add_argument(
        "--checkpoint",
        choices=("final", "best"),
        default="final",
        help="whose validations are pooled; the best epoch was chosen on the same cases (default: final)",
    )
    kind.add_argument("-ref", metavar="FILE", help="table of true labels: case,subject,TARGET… (default: theirs)")
    kind.add_argument("-djfile", metavar="FILE", help="dataset.json with the targets (default: beside the runs)")


def run(args):
    runners = {"segmentation": _segmentation, "classification": _classification, "tokens": _tokens, **INDEX_KINDS}
    return runners[args.kind](args)


def _tokens(args):
    from nnssl_plugin.io.files import write_json
    from nnssl_plugin.tasks.probing.tokens import evaluate_tokens, table

    result = evaluate_tokens(
        args.d,
        args.p,
        configuration=args.c,
        weights=args.w,
        fold=args.f,
        cases=args.cases,
        stride=args.stride,
        device=args.device,
    )
    if args.o:
        write_json(args.o, result)
    print(table(result))


def _segmentation(args):
    from nnssl_plugin.io.text import some
    from nnssl_plugin.tasks.segmentation.evaluation import evaluate_segmentation
    from nnssl_plugin.tasks.segmentation.metrics import METRICS, WITHOUT_MONAI
    from nnssl_plugin.tasks.segmentation.summaries import table

    evaluation = evaluate_segmentation(
        _named_places(args.i),
        args.o,
        references=args.ref,
        dataset_json=args.djfile,
        folds=args.f,
        tolerance_mm=args.tolerance_mm,
        processes=args.np,
        subjects=args.subjects,
    )
    print(table(evaluation.summaries, evaluation.comparison, evaluation.metrics))
    if len(evaluation.metrics) < len(METRICS):
        print(f"\n{WITHOUT_MONAI}")
    for name, odd in evaluation.odd.items():
        for text, cases in odd.items():
            print(f"\nWarning: {name}: {text} ({some(cases)})")
    for found in evaluation.runs:
        if found.missing:
            print(
                f"\n{found.name}: {len(found.missing)} cases were not predicted and count nowhere: "
                f"{', '.join(found.missing)}"
            )
    print(f"\nWritten to {evaluation.folder}")


def _classification(args):
    from nnssl_plugin.tasks.classification.evaluation import class_table, evaluate_classification, model_folders

    places = _named_places(args.i) if args.i else model_folders(args.d, args.tr, args.p, args.c)
    evaluation = evaluate_classification(
        places, args.o, folds=args.f, references=args.ref, dataset_json=args.djfile, checkpoint=args.checkpoint
    )
    print(class_table(evaluation))
    print(
        "\nWritten to", *(found.folder for found in evaluation.runs.values()), *([args.o] if args.o else []), sep="\n  "
    )


def _named_places(given: list[str]) -> dict[str, str]:
    from nnssl_plugin.errors import UserError

    places = {}
    for text in given:
        name, separator, place = text.partition("=")
        if not separator or not place:
            raise UserError(f"'{text}' is not NAME=DIR.", f"For example: -i scratch={place or name}")
        if name in places:
            raise UserError(f"Two runs are called '{name}'.", "Give each run a name of its own.")
        places[name] = place
    return places
