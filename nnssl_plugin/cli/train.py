"""nnU-Net's training command with the environment set: every argument but --time-limit is nnUNetv2_train's.

    nnssl_plugin train 501 3d_fullres all -tr Med3DInsightPretrainer
    nnssl_plugin train 501 3d_fullres all -tr Med3DInsightPretrainer --time-limit 11.5h   # then again with --c
    torchrun --nproc_per_node 4 -m nnssl_plugin.cli.main train 501 3d_fullres all -tr Med3DInsightPretrainer

A run that stopped early (time limit, SIGTERM, SIGINT) leaves checkpoint_latest.pth and exits with code 75.
"""

from nnssl_plugin.cli.env import search_path

PASSES_ON = True
"""Unknown arguments are not an error here: they are nnU-Net's."""


def add_arguments(parser):
    parser.add_argument("--time-limit", metavar="TIME", help="stop pretraining with a checkpoint after 90m, 11.5h, 2d")


def run(args):
    from nnssl_plugin.training.launch import launch

    launch(args.passed_on, search_path=search_path(), time_limit=args.time_limit)
