"""Take shared weights back as a checkpoint.

    nnssl_plugin import my_weights -o pretrained.pth
    nnssl_plugin import --trust old_checkpoint.pth -o plain.pth

Reads a folder that export wrote (every file is compared with its hash, and the weights come back bit for bit), or a
file of weights. adapt and nnU-Net's -pretrained_weights read the checkpoint; it has no optimiser, so --c cannot go on
from it. A pickled file that runs code is refused with a list of what it would run, unless --trust is given.
"""


def add_arguments(parser):
    parser.add_argument("source", metavar="DIR_OR_FILE", help="a shared folder, or a file of weights")
    parser.add_argument("-o", required=True, metavar="CHECKPOINT", help="checkpoint to write (.pth)")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the code that the file brings; only for a file whose author you know and trust",
    )


def run(args):
    from nnssl_plugin.checkpoints.sharing.importing import import_weights

    print(f"wrote {import_weights(args.source, args.o, trust=args.trust)}")
    print(f"next: nnssl_plugin adapt -d TARGET_ID -w {args.o} -n NAME")
