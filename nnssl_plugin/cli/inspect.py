"""Say what a file with weights is, in one screen: method, network, input, data, health, licence, and how to use it.

    nnssl_plugin inspect nnUNet_results/Dataset501_MR/…/fold_all/checkpoint_final.pth
    nnssl_plugin inspect VoCo_B_SSL_head.pt --mapping voco-b --json report.json
    nnssl_plugin inspect nnUNet_results/Dataset501_MR/…/fold_all/skipped_step.json
    nnssl_plugin inspect fold_all/checkpoint_final.pth --arrays templates

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
    parser.add_argument(
        "--arrays", metavar="DIR", help="also write the volumes that were learned (templates) as NIfTI, and a picture"
    )


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
    if args.arrays:
        _write_arrays(args.file, args.arrays)


def _showed_skipped_step(file):
    from nnssl_plugin.pretraining.skipped_steps import is_skipped_file, skipped_screen

    if not is_skipped_file(file):
        return False
    print(skipped_screen(file))
    return True


def _write_arrays(file, folder):
    from pathlib import Path

    from nnssl_plugin.checkpoints.format.spatial_arrays import KNOWN_AXES, read_spatial_arrays
    from nnssl_plugin.checkpoints.sharing.array_files import file_name, write_nifti
    from nnssl_plugin.errors import UserError
    from nnssl_plugin.training.pictures import draw_pictures

    arrays = read_spatial_arrays(file)
    if not arrays:
        raise UserError(f"{file} holds no arrays beside its weights.", "Leave --arrays out.")
    for path in write_nifti(arrays, folder):
        print(f"wrote {path}")
    for name, array in arrays.items():
        path = Path(folder) / f"{file_name(name)}.png"
        letters = array.axes if set(array.axes) == set(KNOWN_AXES) else None
        draw_pictures(list(zip(array.names, array.values, strict=True)), path, array.spacing_mm, letters)
        print(f"wrote {path}")
