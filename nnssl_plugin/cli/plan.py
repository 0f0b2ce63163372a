"""Write a plan of a new name with other settings; plans are never edited in place.

    nnssl_plugin plan -d 501 -n med3d50 --set epochs=50 method.epsilon=0.1
    nnssl_plugin plan -d 501 -n small --set configurations.3d_fullres.batch_size=2 \\
        'configurations.3d_fullres.architecture.arch_kwargs.features_per_stage=[16,32,64]'
    nnssl_plugin plan -d 501 -n primus --preset primus-s med3dinsight
    nnssl_plugin plan -d 7 -n like501 --like fold_all/checkpoint_final.pth

Values are JSON where they parse, else text. A key that starts with configurations, pretraining, finetuning or
classification counts from the top of the plan; any other key goes under pretraining, where the pretraining trainers
read their settings.

--like writes a plan with the network of a checkpoint (and its spacing and normalisation, where asked for), so that
adapt can load the whole encoder. A network of a class that this package does not know is not built without --trust.
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or name")
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new plan")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plan to start from (default: nnUNetPlans)")
    parser.add_argument(
        "--preset", nargs="+", default=[], metavar="NAME", help="files of nnssl_plugin.plans, merged in before --set"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="values to change",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a plan of this name")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build a network of any class; only for a plan or file whose author you know and trust",
    )
    like = parser.add_argument_group("with the network of a checkpoint")
    like.add_argument("--like", metavar="CHECKPOINT", help="pretrained weights of any kind that adapt reads")
    like.add_argument(
        "-c",
        default="3d_fullres",
        metavar="CONFIG",
        help="the configuration that gets the network; the new plan holds it alone (default: 3d_fullres)",
    )
    like.add_argument("--spacing", action="store_true", help="take over the checkpoint's voxel spacing")
    like.add_argument("--normalisation", action="store_true", help="take over the checkpoint's normalisation")
    like.add_argument("--orientation", action="store_true", help="take over the checkpoint's reader of images")
    like.add_argument("--mapping", metavar="TABLE", help="names the keys of foreign weights, as for adapt")


def run(args):
    from nnssl_plugin.errors import UserError
    from nnssl_plugin.io.text import printable

    if args.like is None and (args.spacing or args.normalisation or args.orientation or args.mapping):
        raise UserError(
            "--spacing, --normalisation, --orientation and --mapping say what to take of a checkpoint; none is named.",
            "Add --like CHECKPOINT.",
        )
    written = _edited(args) if args.like is None else _like(args)
    for change in written.changes:
        print(change)
    print(f"wrote {written.path}" if written.changes else f"wrote {written.path}, equal to {args.p} but for its name")
    for note in written.notes:
        print(printable(note))
    for configuration in written.to_preprocess:
        print(f"next: nnUNetv2_preprocess -d {args.d} -plans_name {args.n} -c {configuration}")
    if args.like is not None:
        mapping = f" --mapping {args.mapping}" if args.mapping else ""
        print(f"next: nnssl_plugin adapt -d {args.d} -w {args.like} -c {args.c} -p {args.n} -n NAME{mapping}")


def _edited(args):
    from nnssl_plugin.cli.plan_blocks import check_blocks
    from nnssl_plugin.nnunet.plan_edits import write_edited_plan

    return write_edited_plan(
        args.d,
        args.n,
        source=args.p,
        presets=args.preset,
        assignments=args.assignments,
        overwrite=args.overwrite,
        trust=args.trust,
        check_blocks=check_blocks,
    )


def _like(args):
    from nnssl_plugin.checkpoints.adaptation.like import plan_like
    from nnssl_plugin.checkpoints.sources.source import read_source
    from nnssl_plugin.cli.plan_blocks import check_blocks

    source = read_source(args.like, mapping=args.mapping)
    return plan_like(
        args.d,
        source,
        name=args.n,
        plans_name=args.p,
        configuration=args.c,
        spacing=args.spacing,
        normalisation=args.normalisation,
        orientation=args.orientation,
        presets=args.preset,
        assignments=args.assignments,
        overwrite=args.overwrite,
        trust=args.trust,
        check_blocks=check_blocks,
    )
