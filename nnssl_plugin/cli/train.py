"""nnU-Net's training command with the environment set: every argument but these is nnUNetv2_train's.

    nnssl_plugin train 501 3d_fullres all -tr Med3DInsightPretrainer
    nnssl_plugin train 501 3d_fullres all -tr Med3DInsightPretrainer --time-limit 11.5h   # then again with --c
    nnssl_plugin train 501 3d_fullres all -tr Med3DInsightPretrainer --ranks 4            # on 4 GPUs

A run that stopped early (time limit, SIGTERM, SIGINT) leaves checkpoint_latest.pth and exits with code 75.
"""

from nnssl_plugin.cli.env import search_path

PASSES_ON = True
"""Unknown arguments are not an error here: they are nnU-Net's."""


def add_arguments(parser):
    parser.add_argument("--time-limit", metavar="TIME", help="stop with a checkpoint after 90m, 11.5h, 2d")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="train on N GPUs of this machine")


def run(args):
    from nnssl_plugin.training.launch import launch

    return launch(args.passed_on, search_path=search_path(), time_limit=args.time_limit, ranks=args.ranks)
