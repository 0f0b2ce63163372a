"""Classify images with a trained model: one row per case, with the probability of every class.

    nnssl_plugin classify -i IMAGES -o predictions.csv -m nnUNet_results/Dataset012_X/TRAINER__PLANS__CONFIG
    nnssl_plugin classify -i IMAGES -o predictions.csv -m MODEL_FOLDER -f 0 1 2 3 4 --tta -device cuda --explain looks

Images are named as for nnU-Net (CASE_0000.nii.gz, one file per channel) and preprocessed as in training; the folds'
probabilities are averaged. Rows are written as cases are finished: the same command goes on after an interruption. A
case that cannot be used is named and left out; the exit code is then 1. --explain needs MONAI and runs the model about
350 times per case.
"""

FAILED = 1


def add_arguments(parser):
    parser.add_argument("-i", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("-o", required=True, metavar="CSV", help="the table; several targets: one file each")
    parser.add_argument("-m", required=True, metavar="DIR", help="model folder, TRAINER__PLANS__CONFIG")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: all that are trained)")
    parser.add_argument(
        "-chk",
        "--checkpoint",
        default="final",
        metavar="FILE",
        help="final, best (on its fold's validation cases), or a file of the folds' folders (default: final)",
    )
    parser.add_argument("--tta", action="store_true", help="also show each image mirrored, and average")
    parser.add_argument("-seg", metavar="DIR", help="segmentations, for a model that crops to their labels")
    parser.add_argument("--explain", metavar="DIR", help="a picture per case of where the model looked")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build a network of any class; only for a model whose author you know and trust",
    )


def run(args):
    from nnssl_plugin.tasks.classification.inference import classify_images

    found = classify_images(
        args.i,
        args.o,
        args.m,
        folds=args.f,
        checkpoint=args.checkpoint,
        mirroring=args.tta,
        device=args.device,
        segmentations=args.seg,
        explanations=args.explain,
        trust=args.trust,
    )
    for case, reasons in found.warnings.items():
        print(f"{case}: {'; '.join(reasons)}")
    for case, reason in found.failed.items():
        print(f"{case}: left out, {reason}.")
    print(
        f"{', '.join(map(str, found.tables))}: {found.done} cases classified, {found.skipped} were there, "
        f"{len(found.failed)} left out."
    )
    return FAILED if found.failed else 0
