"""Write a fine-tuning plan and its weights from a pretraining checkpoint.

    nnssl_plugin adapt -d 7 -w nnUNet_results/Dataset501_MR/…/fold_all/checkpoint_final.pth -n med3d
    nnssl_plugin adapt -d 7 -n scratch --from-scratch

Writes PLANS-NAME.json beside the plan of the target, the weights in the target's layout, and a report that lists every
tensor. A plan that adapt wrote itself is replaced as long as nothing was trained with it. Other numbers of channels,
stages and blocks, other kernels, strides and token grids are adapted by the rules of docs/reference/adaptation.md.
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="target dataset, ID or name")
    parser.add_argument(
        "-w",
        metavar="CHECKPOINT",
        help="checkpoint of a pretraining, of nnU-Net or nnssl, plain weights, or a shared folder",
    )
    parser.add_argument("-n", required=True, metavar="NAME", help="the plan is written as PLANS-NAME")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="the target's plan (default: nnUNetPlans)")
    parser.add_argument("--from-scratch", action="store_true", help="the same plan and schedule from random weights")
    parser.add_argument(
        "--min-coverage",
        type=float,
        default=0.8,
        metavar="FRACTION",
        help="part of the encoder's parameters that must be loaded (default: 0.8)",
    )
    parser.add_argument(
        "--mapping",
        metavar="TABLE",
        help="how the keys of foreign weights are renamed: the name of a table of this package, or a JSON file",
    )
    parser.add_argument(
        "--stem", metavar="ID", help="the stem to take, of a checkpoint that has one for each dataset (see inspect)"
    )
    parser.add_argument("--inflate", action="store_true", help="also adapt 2D weights to a 3D network, and back")
    parser.add_argument(
        "--resize-width", action="store_true", help="also adapt layers of other widths, by their first channels"
    )
    parser.add_argument(
        "--token-grid",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens per axis of the checkpoint's positional embedding, where the file does not tell",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build the plan's network whatever its class; only for a plan whose author you know and trust",
    )


def run(args):
    from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
    from nnssl_plugin.checkpoints.adaptation.options import AdaptationOptions
    from nnssl_plugin.io.text import printable

    adapted = adapt_checkpoint(
        args.d,
        name=args.n,
        weights=args.w,
        configuration=args.c,
        plans_name=args.p,
        from_scratch=args.from_scratch,
        min_coverage=args.min_coverage,
        mapping=args.mapping,
        stem=args.stem,
        trust=args.trust,
        options=AdaptationOptions(
            inflate=args.inflate,
            resize_width=args.resize_width,
            source_grid=tuple(args.token_grid) if args.token_grid else None,
        ),
    )
    if adapted.report is not None:
        print(printable(adapted.report.table()))
    for written in (adapted.plan, adapted.weights, adapted.report_file):
        if written is not None:
            print(f"wrote {written}")
    print(f"next: nnUNetv2_train {args.d} {args.c} 0 -p {adapted.plans_name} -tr {_trainer(adapted)}")


def _trainer(adapted):
    """That of the method's own fine-tuning, where what it needs beside the weights came along."""
    from nnssl_plugin.registry import METHODS, TASKS

    own = METHODS[adapted.method].finetuning if adapted.arrays and adapted.method in METHODS else "segmentation"
    return TASKS[own].trainer_name
