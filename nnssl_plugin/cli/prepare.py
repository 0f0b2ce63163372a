"""Make an nnU-Net dataset from a folder of scans (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd) or, where it holds none, of
2D images (.png, .jpg, .bmp, .tif).

    nnssl_plugin prepare -i /data/scans -d 501 -n Unlabelled --modality MR
    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres

Scans are linked or rewritten, never changed. Each gets a body mask as its label. Files that cannot be used are listed
in rejected.csv with the reason, and the exit code is then 1. Running it again adds what is new.

With class labels, for classification (columns: case,subject,TARGET; case is a file or folder below -i):

    nnssl_plugin prepare -i /data/scans -d 502 -n Nodules --class-labels labels.csv
    nnssl_plugin prepare -d 7 --class-labels labels.csv --target grade:ordinal:low,mid,high

The second form, without -i, adds them to a dataset that is there.
"""

SHOWN = 5
"""Refused files that are printed; the table holds them all."""


def add_arguments(parser):
    parser.add_argument("-i", metavar="DIR", help="folder of the scans, searched with its subfolders")
    parser.add_argument(
        "-d",
        required=True,
        metavar="ID",
        help="ID of the dataset to make or extend (1-999); without -i also its full name",
    )
    parser.add_argument("-n", metavar="NAME", help="its name: DatasetID_NAME")
    parser.add_argument(
        "--modality",
        choices=("MR", "PET", "CT", "grey", "RGB", "noNorm", "rescale_to_0_1"),
        help="MR, PET: z-score normalisation; CT: intensities in HU, nnU-Net's CT normalisation (default: MR); "
        "2D images: grey or RGB (default: grey); noNorm: values as stored, for binary shapes; rescale_to_0_1: "
        "each image stretched to [0, 1]",
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="worker processes (default: 2)")
    parser.add_argument("--class-labels", metavar="CSV", help="take the scans that this table names, with classes")
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="SPEC",
        help="columns to predict: NAME, NAME:KIND or NAME:KIND:CLASS,CLASS, where KIND is binary "
        "(second class: positive), multiclass, multilabel or ordinal (lowest first)",
    )


def run(args):
    _check(args)
    if args.i is None:
        return _label(args)
    if args.class_labels is None:
        from nnssl_plugin.intake.unlabelled import prepare_dataset

        return _report(prepare_dataset(args.i, _number(args.d), args.n, modality=args.modality, processes=args.np))
    from nnssl_plugin.intake.labelled import prepare_class_dataset

    summary, labelled = prepare_class_dataset(
        args.i,
        _number(args.d),
        args.n,
        table=args.class_labels,
        targets=args.target,
        modality=args.modality,
        processes=args.np,
    )
    code = _report(summary)
    _report_labels(labelled)
    return code


def _check(args):
    from nnssl_plugin.errors import UserError

    if args.target and args.class_labels is None:
        raise UserError("--target describes a column of a table.", "Give the table too: --class-labels FILE.csv")
    if args.i is None and args.class_labels is None:
        raise UserError("Nothing to prepare.", "Give a folder of scans (-i DIR), a table (--class-labels), or both.")
    if args.i is not None and args.n is None:
        raise UserError("The dataset has no name.", "Give one: -n NAME")


def _number(dataset):
    from nnssl_plugin.errors import UserError

    if not dataset.isdecimal():
        raise UserError(f"Dataset ID {dataset}.", "Give a number from 1 to 999: -d 501")
    return int(dataset)


def _label(args):
    from nnssl_plugin.intake.labelled import label_dataset

    _report_labels(label_dataset(args.d, table=args.class_labels, targets=args.target))


def _report(summary):
    from nnssl_plugin.intake.unlabelled import made_grey

    print(f"{summary.folder}: {len(summary.added)} cases added, {summary.known} known, {summary.ignored} other files.")
    grey = made_grey(summary)
    if grey:
        print(f"  {grey} images had colour and were made grey; --modality RGB (another dataset) keeps it")
    for case in summary.missing[:SHOWN]:
        print(f"  the source of case {case} is gone")
    if len(summary.missing) > SHOWN:
        print(f"  and of {len(summary.missing) - SHOWN} more cases")
    if not summary.rejected:
        return 0
    print(f"{len(summary.rejected)} rejected, see {summary.folder / 'rejected.csv'}:")
    for row in summary.rejected[:SHOWN]:
        print(f"  {row.source}: {row.reason}")
    if len(summary.rejected) > SHOWN:
        print(f"  and {len(summary.rejected) - SHOWN} more")
    return 1


def _report_labels(labelled):
    from nnssl_plugin.intake.labelled import describe, warn_of_rare_classes, warn_of_similar_classes
    from nnssl_plugin.io.text import some

    print(f"{labelled.path}: {len(labelled.labels.cases)} cases with class labels.")
    print("\n".join(describe(labelled.labels)))
    for warning in [*warn_of_similar_classes(labelled.labels), *warn_of_rare_classes(labelled.labels)]:
        print(f"Warning: {warning}")
    if labelled.dropped:
        print(f"Warning: {len(labelled.dropped)} rows are left out with their rejected scans: {some(labelled.dropped)}")
    if labelled.left_out:
        print(f"{labelled.left_out} scans without a row are left out.")
    if labelled.unlabelled:
        print(
            f"Warning: {len(labelled.unlabelled)} cases of the dataset have no row and are not used for "
            f"classification: {some(labelled.unlabelled)}"
        )
