"""Write a plan of a new name with other settings; plans are never edited in place.

    nnssl_plugin plan -d 501 -n med3d50 --set epochs=50 method.epsilon=0.1
    nnssl_plugin plan -d 501 -n small --set configurations.3d_fullres.batch_size=2 \\
        'configurations.3d_fullres.architecture.arch_kwargs.features_per_stage=[16,32,64]'

Values are JSON where they parse, else text. A key that starts with configurations, pretraining or finetuning counts
from the top of the plan; any other key goes under pretraining, where the pretraining trainers read their settings.
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or name")
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new plan")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plan to start from (default: nnUNetPlans)")
    parser.add_argument("--preset", metavar="NAME", help="a file of nnssl_plugin.plans, merged in before --set")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="assignments",
                        help="values to change")
    parser.add_argument("--overwrite", action="store_true", help="replace a plan of this name")


def run(args):
    from nnssl_plugin.plan_edits import write_edited_plan

    written = write_edited_plan(args.d, args.n, source=args.p, preset=args.preset, assignments=args.assignments,
                                overwrite=args.overwrite)
    for change in written.changes:
        print(change)
    print(f"wrote {written.path}" if written.changes else f"wrote {written.path}, equal to {args.p} but for its name")
    for configuration in written.to_preprocess:
        print(f"next: nnUNetv2_preprocess -d {args.d} -plans_name {args.n} -c {configuration}")
