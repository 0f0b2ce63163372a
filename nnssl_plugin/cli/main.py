"""Entry point: finds the verb, parses its flags, turns errors into a few lines and an exit code."""

import argparse
import importlib
import sys

from nnssl_plugin import __version__
from nnssl_plugin.errors import FAILED, UserError
from nnssl_plugin.io.text import printable

VERBS = {
    "methods": "list the pretraining methods",
    "doctor": "is everything in order, and what will nnU-Net find?",
    "env": "print the line that lets nnU-Net find the trainers of this package",
    "prepare": "make an nnU-Net dataset from a folder of scans, with class labels or without",
    "caption": "choose slices of every case, describe them, review the texts, and store embeddings",
    "clip": "fine-tune image and text encoders on slices and texts, then embed",
    "plan": "write a plan of a new name with other settings",
    "train": "nnU-Net's training command with the environment set",
    "adapt": "write a fine-tuning plan and its weights from a pretraining checkpoint",
    "export": "weights as a folder to share, or a model for nnU-Net without this package",
    "import": "take shared weights back as a checkpoint",
    "inspect": "what is in this file with weights?",
    "evaluate": "score segmentations or classifiers, compare runs case by case, and probe features",
    "classify": "classify images with a trained model, and show where it looked",
    "fill": "fill in modalities that cases lack, before nnUNetv2_predict",
    "embed": "an index of embeddings from a folder of images and a pretrained encoder",
    "search": "the images of an index that are most like yours, with a contact sheet",
    "index": "add to, remove from, or describe an index of embeddings",
    "split": "folds by class and subject, and folds with fewer labels",
    "quickstart": "run the whole pipeline in minutes, on phantoms or your scans, with a report",
}
"""Verb → one line of help. Each verb is a module of this package with ``add_arguments(parser)`` and ``run(args)``."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser(arguments[0] if arguments else "")
    args, args.passed_on = parser.parse_known_args(arguments)
    module = importlib.import_module(f"nnssl_plugin.cli.{args.verb}")
    if args.passed_on and not getattr(module, "PASSES_ON", False):
        parser.error(f"unrecognised arguments: {' '.join(args.passed_on)}")
    try:
        return module.run(args) or 0
    except UserError as error:
        print(printable(f"nnssl_plugin {args.verb}: {error.problem}"), file=sys.stderr)
        if error.remedy:
            print(printable(error.remedy), file=sys.stderr)
        return FAILED


def build_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of the command, with the flags of the verb ``chosen``.

    Only its module is imported: others may take seconds.
    """
    parser = argparse.ArgumentParser(prog="nnssl_plugin", description="Self-supervised pretraining for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnssl_plugin {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if verb == chosen:
            module = importlib.import_module(f"nnssl_plugin.cli.{verb}")
            sub.description = module.__doc__
            module.add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
