"""Make an nnU-Net dataset from a folder of unlabelled scans (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd).

    nnssl_plugin prepare -i /data/scans -d 501 -n Unlabelled --modality MR
    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres

Scans are linked or rewritten, never changed. Each gets a body mask as its label. Files that cannot be used are listed
in rejected.csv with the reason, and the exit code is then 1. Running it again adds what is new.
"""

SHOWN = 5
"""Refused files that are printed; the table holds them all."""


def add_arguments(parser):
    parser.add_argument("-i", required=True, metavar="DIR", help="folder of the scans, searched with its subfolders")
    parser.add_argument("-d", required=True, type=int, metavar="ID", help="ID of the dataset to make or extend (1-999)")
    parser.add_argument("-n", required=True, metavar="NAME", help="its name: DatasetID_NAME")
    parser.add_argument(
        "--modality",
        choices=("MR", "CT"),
        default="MR",
        help="MR: z-score normalisation; CT: intensities in HU, nnU-Net's CT normalisation (default: MR)",
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="worker processes (default: 2)")


def run(args):
    from nnssl_plugin.intake.unlabelled import prepare_dataset

    summary = prepare_dataset(args.i, args.d, args.n, modality=args.modality, processes=args.np)
    print(f"{summary.folder}: {len(summary.added)} cases added, {summary.known} known, {summary.ignored} other files.")
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
