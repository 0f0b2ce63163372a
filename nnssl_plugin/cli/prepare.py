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

SHOWN = 5
"""Reasons, folders or cases that are printed; the tables hold them all."""


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
    parser.add_argument(
        "--include",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="take only scans whose path below -i, or file name, matches, for example '*_T1*' (* matches / too)",
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out scans that match")
    parser.add_argument(
        "--keep",
        nargs="*",
        metavar="PATTERN",
        help="take scans that match (without a pattern: all) even where they look like a segmentation or like another "
        "modality",
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        default=[],
        metavar="NAME=PATTERN",
        help='channels of a case and the files that show them, for example "T1=*_t1n*" "T2=*_t2w*"; what * matches '
        "names the case. Or a csv: case, one column of files per modality, perhaps label",
    )
    parser.add_argument(
        "--cases-by",
        choices=("name", "folder"),
        default="name",
        help="with --modalities: files with the same name but for the modality are one case, or those in one folder",
    )
    parser.add_argument(
        "--labels",
        nargs="*",
        metavar="PATTERN",
        help="with --modalities: files with the segmentations, which become the labels (otherwise body masks do); "
        "without a pattern: labelsTr, where the folder has imagesTr and dataset.json",
    )
    parser.add_argument(
        "--resample",
        action="store_true",
        help="put images on another grid onto that of the first image of the case",
    )
    parser.add_argument("-num_parts", type=int, metavar="N", help="share the cases among N runs, or machines")
    parser.add_argument("-part_id", type=int, metavar="K", help="which of them this is, from 0")
    parser.add_argument("--merge", action="store_true", help="with -num_parts: put together what all parts did")
    parser.add_argument("-np", type=int, default=2, metavar="N", help="worker processes (default: 2)")
    parser.add_argument(
        "--suffix",
        nargs="+",
        default=[],
        metavar="SUFFIX",
        help="BIDS: take scans whose names end so, such as T1w FLAIR (default: all in anat, pet, ct and micr); "
        "derivatives are left out, and --class-labels takes participants.tsv",
    )
    parser.add_argument(
        "--series",
        nargs="+",
        default=[],
        metavar="RULE",
        help="DICOM: take series that fulfil one of the rules, conditions with commas between, such as "
        "'Modality=MR,SeriesDescription~T1' (operators: = != ~ !~ < >; attributes: see series.csv)",
    )
    parser.add_argument(
        "--structures",
        nargs="+",
        default=[],
        metavar="NAME=LABEL",
        help="DICOM: the labels of the dataset, from RTSTRUCT and SEG; NAME is that of a structure, * stands for any "
        "characters, or its kind (GTV, ORGAN)",
    )
    parser.add_argument(
        "--key-file", metavar="FILE", help="DICOM: key of the hashes that name cases, made if new (default: in --local)"
    )
    parser.add_argument(
        "--local",
        metavar="DIR",
        help="DICOM: folder for what is not for others: the table of series with its paths, the key, the converted "
        "scans (default: nnUNet_raw/.nnssl_plugin)",
    )
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
    if _is_export(args):
        return _prepare_dicom(args)
    return _prepare_bids(args) if _is_bids(args) else _prepare_scans(args)


def _prepare_scans(args):
    if args.class_labels is None:
        from nnssl_plugin.intake.unlabelled import ALL, prepare_dataset

        part = _part(args)
        summary = prepare_dataset(
            args.i,
            _number(args.d),
            args.n,
            modality=args.modality,
            modalities=_modalities(args),
            processes=args.np,
            include=args.include,
            exclude=args.exclude,
            keep=() if args.keep is None else args.keep or ALL,
            part=part,
            announce=_announce,
        )
        if part is not None and part.number is not None:
            print(f"Part {part.number} of {part.count} is complete. When all are: -num_parts {part.count} --merge")
            return 0
        return _report(summary)
    from nnssl_plugin.intake.labelled import prepare_class_dataset

    summary, labelled = prepare_class_dataset(
        args.i,
        _number(args.d),
        args.n,
        table=args.class_labels,
        targets=args.target,
        modality=args.modality,
        processes=args.np,
        include=args.include,
        exclude=args.exclude,
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
    if not args.modalities and (args.labels or args.cases_by != "name"):
        raise UserError("--labels PATTERN and --cases-by tell which files are a case.", "Give --modalities too.")
    if args.modalities and args.labels == []:
        raise UserError("--labels without a pattern.", 'Say which files hold the segmentations: --labels "*_seg*"')
    if args.class_labels is not None and (args.modalities or args.num_parts is not None):
        raise UserError(
            "--class-labels goes with neither --modalities nor -num_parts.",
            "Prepare the images first, then add the classes: nnssl_plugin prepare -d ID --class-labels FILE.csv",
        )
    if args.structures and args.class_labels is not None:
        raise UserError("--structures and --class-labels are two kinds of labels.", "Give one of them.")
    if args.i is not None and args.n is None:
        raise UserError("The dataset has no name.", "Give one: -n NAME")


def _modalities(args):
    from nnssl_plugin.intake.grouping import Modalities, parse_modalities
    from nnssl_plugin.intake.unlabelled import ALL

    if args.modalities:
        labels = args.labels or ()
        return parse_modalities(args.modalities, labels=labels, cases_by=args.cases_by, resample=args.resample)
    if args.labels is None and not args.resample:
        return None
    return Modalities(labels=() if args.labels is None else ALL, resample=args.resample)


def _part(args):
    from nnssl_plugin.errors import UserError
    from nnssl_plugin.intake.unlabelled import Part

    if args.num_parts is None and args.part_id is None and not args.merge:
        return None
    if args.num_parts is None or (args.part_id is None) != args.merge:
        raise UserError("A part has a number and a count.", "Give -num_parts N with -part_id K, then with --merge.")
    return Part(args.part_id, args.num_parts)


def _is_bids(args):
    from pathlib import Path

    from nnssl_plugin.intake.bids import is_bids

    return bool(args.suffix) or is_bids(Path(args.i))


def _prepare_bids(args):
    from pathlib import Path

    from nnssl_plugin.intake.bids import bids_patterns, write_bids_subjects
    from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder

    include, exclude = bids_patterns(Path(args.i), args.suffix)
    args.include, args.exclude = args.include or include, [*args.exclude, *exclude]
    code = _prepare_scans(args)
    write_bids_subjects(raw_dataset_folder(args.d))
    return code


def _is_export(args):
    from pathlib import Path

    from nnssl_plugin.intake.dicom.files import is_export

    return bool(args.series or args.structures) or (Path(args.i).exists() and is_export(Path(args.i)))


def _prepare_dicom(args):
    from nnssl_plugin.intake.dicom.prepare import DicomChoice, prepare_dicom_class_dataset, prepare_dicom_dataset
    from nnssl_plugin.intake.unlabelled import ALL

    choice = DicomChoice(
        modality=args.modality,
        series=args.series,
        structures=args.structures,
        include=args.include,
        exclude=args.exclude,
        key_file=args.key_file,
        local=args.local,
    )
    labelled = None
    if args.class_labels is None:
        keep = () if args.keep is None else args.keep or ALL
        summary, converted = prepare_dicom_dataset(
            args.i, _number(args.d), args.n, choice, keep=keep, processes=args.np
        )
    else:
        summary, labelled, converted = prepare_dicom_class_dataset(
            args.i, _number(args.d), args.n, choice, table=args.class_labels, targets=args.target, processes=args.np
        )
    _report_series(converted)
    code = max(_report(summary), 1 if converted.has_failures else 0)
    if labelled is not None:
        _report_labels(labelled)
    return code


def _report_series(converted):
    from nnssl_plugin.intake.dicom.table import LEFT_OUT, REFUSED, TAKEN, count_reasons

    counts = ", ".join(f"{len(converted.with_status(status))} {status}" for status in (TAKEN, LEFT_OUT, REFUSED))
    print(f"Series: {counts}; why: {converted.places.table}")
    _print_some(count_reasons([*converted.with_status(REFUSED), *converted.with_status(LEFT_OUT)]), "{}")
    _print_some(converted.told, "{}")
    _print_some(converted.unreadable, "unreadable: {}")


def _number(dataset):
    from nnssl_plugin.errors import UserError

    if not dataset.isdecimal():
        raise UserError(f"Dataset ID {dataset}.", "Give a number from 1 to 999: -d 501")
    return int(dataset)


def _label(args):
    from nnssl_plugin.intake.labelled import label_dataset

    _report_labels(label_dataset(args.d, table=args.class_labels, targets=args.target))


def _announce(ahead):
    print(
        f"To look at: {ahead.cases} cases ({ahead.files} files, {_bytes(ahead.read)}, {ahead.voxels / 1e6:.3g} million "
        f"voxels); {ahead.known} are known."
    )
    if ahead.cases:
        minutes = f"{ahead.seconds / 60:.0f} minutes" if ahead.seconds > 90 else f"{ahead.seconds:.0f} seconds"
        print(f"  about {minutes}, and {_bytes(ahead.written)} on the disk, which has {_bytes(ahead.free)} left")


def _bytes(count):
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _report(summary):
    from nnssl_plugin.intake.unlabelled import made_grey

    print(f"{summary.folder}: {len(summary.added)} cases added, {summary.known} known, {summary.ignored} other files.")
    grey = made_grey(summary)
    if grey:
        print(f"  {grey} images had colour and were made grey; --modality RGB (another dataset) keeps it")
    if summary.dicom:
        print(f"  {summary.dicom} of the other files are DICOM; --series RULE takes these instead (another dataset)")
    if summary.excluded:
        print(f"  {summary.excluded} scans are left out by --include and --exclude")
    if summary.unnamed:
        print(f"  {summary.unnamed} scans belong to no modality by --modalities")
    _print_some([f"cases without {name}: {count}" for name, count in summary.absent], "{}")
    _print_some(summary.unread, "not searched: {}")
    _print_some(summary.missing, "the source of case {} is gone")
    _print_files(summary.refused, "rejected", summary)
    _print_files(summary.set_aside, "set aside", summary)
    if summary.set_aside:
        print("  --keep PATTERN takes them all the same; --exclude PATTERN leaves them out without a word")
    _print_some(summary.overview, "{}")
    if summary.contact_sheet:
        print(f"One look finds wrong scans and masks: {summary.contact_sheet}")
    if summary.histograms:
        print(f"Sizes, spacings, intensities and masks of all cases: {summary.histograms}")
    return 1 if summary.rejected or summary.unread else 0


def _print_files(rows, what, summary):
    from nnssl_plugin.intake.overview import count_reasons

    if not rows:
        return
    print(f"{len(rows)} {what}, see {summary.folder / 'rejected.csv'}:")
    groups = [
        f"{count} x {kind}, for example {row.source}" if count > 1 else f"{row.source}: {row.reason}"
        for count, kind, row in count_reasons(rows)
    ]
    _print_some(groups, "{}")


def _print_some(texts, line):
    from nnssl_plugin.io.text import printable

    for text in texts[:SHOWN]:
        print("  " + line.format(printable(text)))
    if len(texts) > SHOWN:
        print(f"  and {len(texts) - SHOWN} more")


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
