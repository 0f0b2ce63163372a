"""Write a fine-tuning plan and its weights from a pretraining checkpoint.

    nnssl_plugin adapt -d 7 -w nnUNet_results/Dataset501_MR/…/fold_all/checkpoint_final.pth -n med3d
    nnssl_plugin adapt -d 7 -n scratch --from-scratch

Writes PLANS-NAME.json beside the plan of the target, the weights in the target's layout, and a report that lists every
tensor. A plan that adapt wrote itself is replaced as long as nothing was trained with it.
"""

TRAINER = "PretrainedSegmentationTrainer"


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="target dataset, ID or name")
    parser.add_argument("-w", metavar="CHECKPOINT", help="checkpoint of the pretraining")
    parser.add_argument("-n", required=True, metavar="NAME", help="the plan is written as PLANS-NAME")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIG", help="configuration (default: 3d_fullres)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="the target's plan (default: nnUNetPlans)")
    parser.add_argument("--from-scratch", action="store_true",
                        help="the twin: the same plan and schedule from random weights")
    parser.add_argument("--min-coverage", type=float, default=0.8, metavar="FRACTION",
                        help="part of the encoder's parameters that must be loaded (default: 0.8)")


def run(args):
    from nnssl_plugin.checkpoints.finetuning import adapt_checkpoint

    adapted = adapt_checkpoint(args.d, name=args.n, weights=args.w, configuration=args.c, plans_name=args.p,
                               from_scratch=args.from_scratch, min_coverage=args.min_coverage)
    if adapted.report is not None:
        print(adapted.report.table())
    for written in (adapted.plan, adapted.weights, adapted.report_file):
        if written is not None:
            print(f"wrote {written}")
    print(f"next: nnUNetv2_train {args.d} {args.c} 0 -p {adapted.plans_name} -tr {TRAINER}")
