"""Say what a file with weights is, in one screen: method, network, input, data, health, licence, and how to use it.

    nnssl_plugin inspect nnUNet_results/Dataset501_MR/…/fold_all/checkpoint_final.pth
    nnssl_plugin inspect VoCo_B_SSL_head.pt --mapping voco-b --json report.json
    nnssl_plugin inspect nnUNet_results/Dataset501_MR/…/fold_all/skipped_step.json

Reads checkpoints of this package, of nnU-Net and of nnssl, plain state dicts, safetensors, and folders that export
wrote. No code in the file is run. Of a skipped_step.json that a pretraining left it says which samples broke the step.
"""


def add_arguments(parser):
    parser.add_argument("file", metavar="FILE", help="file with weights, or a folder that export wrote")
    parser.add_argument(
        "--mapping",
        metavar="TABLE",
        help="how the keys of foreign weights are renamed: the name of a table of this package, or a JSON file",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="name commands that build a network of any class; only for a file whose author you know and trust",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")


def run(args):
    from nnssl_plugin.checkpoints.sources.inspection import inspect_file, screen
    from nnssl_plugin.io.files import write_json

    if args.file.endswith(".json") and _showed_skipped_step(args.file):
        return
    report = inspect_file(args.file, mapping=args.mapping, trust=args.trust)
    print(screen(report))
    if args.json:
        write_json(args.json, report)
        print(f"wrote {args.json}")


def _showed_skipped_step(file):
    from nnssl_plugin.pretraining.skipped_steps import is_skipped_file, skipped_screen

    if not is_skipped_file(file):
        return False
    print(skipped_screen(file))
    return True
