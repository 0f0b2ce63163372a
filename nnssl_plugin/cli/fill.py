"""Fill in the modalities that cases lack, so that a model of several modalities can predict them.

    nnssl_plugin fill -i imagesTs -o filled -w CHECKPOINT -d 7
    nnUNetv2_predict -i filled -o predictions -d 7 -c 3d_fullres -p PLANS -tr BrainMVPSegmentationTrainer -f 0

CHECKPOINT is BrainMVP's pretraining, what adapt wrote of it, or a fine-tuning from it. Channels are missing whose file
is absent or holds zeros alone; all others are copied. Each template lies on its case centre on centre, in the image's
own grid and such that nnU-Net's preprocessing finds it. --with mean takes the mean of the dataset's preprocessed
training cases, --with zeros what nnU-Net would see without help. A case that cannot be filled in is named and left out;
the exit code is then 1.
"""

FAILED = 1


def add_arguments(parser):
    parser.add_argument("-i", required=True, metavar="DIR", help="folder of images, CASE_0000.nii.gz and so on")
    parser.add_argument("-o", required=True, metavar="DIR", help="folder for all of them, the missing ones too")
    parser.add_argument("-d", required=True, metavar="ID", help="dataset of the model, ID or name")
    parser.add_argument("-w", metavar="CHECKPOINT", help="checkpoint, or shared folder, with templates")
    parser.add_argument(
        "--with",
        dest="using",
        choices=("template", "mean", "zeros"),
        default="template",
        help="what stands in (default: template)",
    )
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="the model's plan (default: nnUNetPlans)")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")


def run(args):
    from collections import Counter

    from nnssl_plugin.io.text import printable
    from nnssl_plugin.tasks.filling.filling import fill_folder

    done = fill_folder(
        args.i,
        args.o,
        dataset=args.d,
        weights=args.w,
        using=args.using,
        plans_name=args.p,
        configuration=args.c,
    )
    for case, reason in done.failed.items():
        print(printable(f"{case}: left out, {reason}."))
    times = Counter(name for names in done.filled.values() for name in names)
    filled = ", ".join(f"{name} in {number}" for name, number in times.items())
    print(
        printable(f"{args.o}: {done.cases} cases; filled in ({args.using}): {filled or 'nothing, all were complete'}")
    )
    return FAILED if done.failed else 0
