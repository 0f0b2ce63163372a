"""Walk the whole road on generated phantoms: pretrain, fine-tune, predict. Needs no data and no network.

    nnssl_plugin quickstart
    nnssl_plugin quickstart -o my_first_run -device cuda

Every command is printed before it runs, so that you can repeat it on your own data.
"""

from pathlib import Path

from nnssl_plugin.cli.env import search_path
from nnssl_plugin.quickstart import walk


def add_arguments(parser):
    parser.add_argument("-o", metavar="DIR", type=Path, default=Path("nnssl_quickstart"),
                        help="an empty or new folder that receives everything (default: ./nnssl_quickstart)")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def run(args):
    dice = walk(args.o, device=args.device, trainers=search_path(), say=_say)
    print("\nMean foreground Dice on the test phantoms (it shows that the road works, not what pretraining brings):")
    for arm, value in dice.items():
        print(f"  {arm:<10} {value:.3f}")
    print(f"Figures, checkpoints and predictions: {args.o}")


def _say(line):
    print(line, flush=True)
