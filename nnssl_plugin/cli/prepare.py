"""Make an nnU-Net dataset from a folder of scans (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd) or, where it holds none, of
2D images (.png, .jpg, .bmp, .tif).

    nnssl_plugin prepare -i /data/scans -d 501 -n Unlabelled --modality MR
    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres

Scans are linked or rewritten, never changed. Each gets a body mask as its label. Files that cannot be used are listed
in rejected.csv with the reason, and the exit code is then 1; so are segmentations and images of another modality,
which are set aside. Running it again adds what is new.

    nnssl_plugin prepare -i /data/scans -d 501 -n Unlabelled --exclude 'labelsTr/*' '*_PET*' --keep 'siteB/*'

Co-registered images of one case become its channels; those that a case lacks are zeros (modalities.json says which):

    nnssl_plugin prepare -i /data/mpmri -d 503 -n Brain --modalities "T1=*t1n*" "T1CE=*t1c*" "T2=*t2w*" --labels "*seg*"

DICOM, as a hospital exports it (folders, zip files), becomes scans named by keyed hashes, RTSTRUCT and SEG labels:

    nnssl_plugin prepare -i EXPORT -d 503 -n Brain --modality MR --series 'SeriesDescription~T1,SliceThickness<3'
    nnssl_plugin prepare -i EXPORT -d 8 -n Tumours --modality CT --structures 'GTV*=1' '*kidney*=2'

With class labels, for classification (columns: case,subject,TARGET; case is a file or folder below -i):

    nnssl_plugin prepare -i /data/scans -d 502 -n Nodules --class-labels labels.csv
    nnssl_plugin prepare -d 7 --class-labels labels.csv --target grade:ordinal:low,mid,high

The second form, without -i, adds them to a dataset that is there.
"""


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
    for add in (_add_choice, _add_modalities, _add_dicom, _add_classes, _add_parts):
        add(parser)


def _add_choice(parser):
    group = parser.add_argument_group("which scans")
    group.add_argument(
        "--include",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="take only scans whose path below -i, or file name, matches, for example '*_T1*' (* matches / too)",
    )
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out scans that match")
    group.add_argument(
        "--keep",
        nargs="*",
        metavar="PATTERN",
        help="take scans that match (without a pattern: all) even where they look like a segmentation or like another "
        "modality",
    )
    group.add_argument(
        "--video",
        type=int,
        metavar="N",
        help="take videos (mp4, avi, gif and others; folders of images) as volumes of N evenly spaced frames in three "
        "colours",
    )


def _add_modalities(parser):
    group = parser.add_argument_group("cases with several modalities")
    group.add_argument(
        "--modalities",
        nargs="+",
        default=[],
        metavar="NAME=PATTERN",
        help='channels of a case and the files that show them, for example "T1=*_t1n*" "T2=*_t2w*"; what * matches '
        "names the case. Or a csv: case, one column of files per modality, perhaps label. DICOM: a study is a "
        "case, and a rule as of --series stands for the pattern",
    )
    group.add_argument(
        "--cases-by",
        choices=("name", "folder"),
        default="name",
        help="with --modalities: files with the same name but for the modality are one case, or those in one folder",
    )
    group.add_argument(
        "--labels",
        nargs="*",
        metavar="PATTERN",
        help="with --modalities: files with the segmentations, which become the labels (otherwise body masks do); "
        "without a pattern: labelsTr, where the folder has imagesTr and dataset.json",
    )
    group.add_argument(
        "--resample",
        action="store_true",
        help="put images on another grid onto that of the first image of the case",
    )


def _add_dicom(parser):
    group = parser.add_argument_group("DICOM and BIDS")
    group.add_argument(
        "--series",
        nargs="+",
        default=[],
        metavar="RULE",
        help="DICOM: take series that fulfil one of the rules, conditions with commas between, such as "
        "'Modality=MR,SeriesDescription~T1' (operators: = != ~ !~ < >; attributes: see series.csv)",
    )
    group.add_argument(
        "--structures",
        nargs="+",
        default=[],
        metavar="NAME=LABEL",
        help="DICOM: the labels of the dataset, from RTSTRUCT and SEG; NAME is that of a structure, * stands for any "
        "characters, or its kind (GTV, ORGAN)",
    )
    group.add_argument(
        "--key-file", metavar="FILE", help="DICOM: key of the hashes that name cases, made if new (default: in --local)"
    )
    group.add_argument(
        "--local",
        metavar="DIR",
        help="DICOM: folder for what is not for others: the table of series with its paths, the key, the converted "
        "scans (default: nnUNet_raw/.nnssl_plugin)",
    )
    group.add_argument(
        "--suffix",
        nargs="+",
        default=[],
        metavar="SUFFIX",
        help="BIDS: take scans whose names end so, such as T1w FLAIR (default: all in anat, pet, ct and micr); "
        "derivatives are left out, and --class-labels takes participants.tsv",
    )


def _add_classes(parser):
    group = parser.add_argument_group("classes")
    group.add_argument("--class-labels", metavar="CSV", help="take the scans that this table names, with classes")
    group.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="SPEC",
        help="columns to predict: NAME, NAME:KIND or NAME:KIND:CLASS,CLASS, where KIND is binary "
        "(second class: positive), multiclass, multilabel or ordinal (lowest first)",
    )


def _add_parts(parser):
    group = parser.add_argument_group("many scans")
    group.add_argument("-np", type=int, default=2, metavar="N", help="worker processes (default: 2)")
    group.add_argument("-num_parts", type=int, metavar="N", help="share the cases among N runs, or machines")
    group.add_argument("-part_id", type=int, metavar="K", help="which of them this is, from 0")
    group.add_argument("--merge", action="store_true", help="with -num_parts: put together what all parts did")


def run(args):
    from nnssl_plugin.cli.prepare_report import (
        print_classes,
        print_preview,
        print_series,
        print_series_ahead,
        print_summary,
        print_videos,
    )

    _check(args)
    if args.i is None:
        from nnssl_plugin.intake.labelled import label_dataset

        print_classes(label_dataset(args.d, table=args.class_labels, targets=args.target))
        return 0
    from nnssl_plugin.intake.prepare import Listener, prepare

    options = _options(args)
    prepared = prepare(args.i, _number(args.d), args.n, options, Listener(print_preview, print_series_ahead))
    if options.part is not None and options.part.number is not None:
        count = options.part.count
        print(f"Part {options.part.number} of {count} is complete. When all are: -num_parts {count} --merge")
        return 0
    if prepared.export is not None:
        print_series(prepared.export)
    if prepared.videos is not None:
        print_videos(prepared.videos)
    print_summary(prepared.summary)
    if prepared.classes is not None:
        print_classes(prepared.classes)
    return 1 if prepared.has_failures else 0


def _check(args):
    from nnssl_plugin.errors import UserError

    if args.i is None and args.class_labels is None:
        raise UserError("Nothing to prepare.", "Give a folder of scans (-i DIR), a table (--class-labels), or both.")
    if args.i is not None and args.n is None:
        raise UserError("The dataset has no name.", "Give one: -n NAME")


def _options(args):
    from nnssl_plugin.intake.prepare import PrepareOptions
    from nnssl_plugin.intake.unlabelled import ALL

    return PrepareOptions(
        modality=args.modality,
        modalities=args.modalities,
        labels=args.labels,
        cases_by=args.cases_by,
        resample=args.resample,
        include=args.include,
        exclude=args.exclude,
        keep=() if args.keep is None else args.keep or ALL,
        suffixes=args.suffix,
        series=args.series,
        structures=args.structures,
        key_file=args.key_file,
        local=args.local,
        class_labels=args.class_labels,
        targets=args.target,
        video=args.video,
        part=_part(args),
        processes=args.np,
    )


def _part(args):
    from nnssl_plugin.errors import UserError
    from nnssl_plugin.intake.unlabelled import Part

    if args.num_parts is None and args.part_id is None and not args.merge:
        return None
    if args.num_parts is None or (args.part_id is None) != args.merge:
        raise UserError("A part has a number and a count.", "Give -num_parts N with -part_id K, then with --merge.")
    return Part(args.part_id, args.num_parts)


def _number(dataset):
    from nnssl_plugin.errors import UserError

    if not dataset.isdecimal():
        raise UserError(f"Dataset ID {dataset}.", "Give a number from 1 to 999: -d 501")
    return int(dataset)
