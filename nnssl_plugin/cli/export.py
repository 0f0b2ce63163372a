"""Make weights that others can use: a pretraining as a folder to share, or a fine-tuned model for stock nnU-Net.

    nnssl_plugin export -w fold_all/checkpoint_final.pth -o my_weights --licence CC-BY-4.0 --results summary.json
    nnssl_plugin export -w fold_all/checkpoint_final.pth -o for_nnssl --format nnssl
    nnssl_plugin export --stock -w Dataset007_X/PretrainedSegmentationTrainer__… -o models --zip model.zip

A shared folder holds the weights as safetensors, the plan, the provenance, a model card (README.md) and hashes. No case
is named in it and no path of this machine; the optimiser stays behind. With --stock, the model predicts on machines
without this package.
"""

FORMATS = ("safetensors", "nnunet", "nnssl", "torchvision", "timm")


def add_arguments(parser):
    parser.add_argument(
        "-w",
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint of a pretraining; with --stock a model folder or a checkpoint in it",
    )
    parser.add_argument("-o", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: import takes it back (default); nnunet: a file for -pretrained_weights; "
        "nnssl: for the fine-tuning commands of nnssl and nnU-Net; torchvision, timm: the encoder of ResNetUNet or "
        "SAMUNet for their own models",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="nnU-Net's summary.json, whose means the model card shows",
    )
    parser.add_argument("--licence", metavar="SPDX", help="licence of the weights (default: the dataset's)")
    parser.add_argument("--stock", action="store_true", help="a fine-tuned model for nnU-Net without this package")
    parser.add_argument("--zip", metavar="FILE", help="with --stock: also a zip for nnU-Net's install command")


def run(args):
    from nnssl_plugin.errors import UserError

    if args.stock:
        _stock(args)
        return
    if args.zip:
        raise UserError(
            "--zip packs a fine-tuned model; a shared folder is shared as it is.", "Add --stock, or leave --zip out."
        )
    from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
    from nnssl_plugin.io.text import printable
    from nnssl_plugin.registry import METHODS

    exported = export_checkpoint(
        args.w,
        args.o,
        layout=args.format,
        results=args.results,
        licence=args.licence,
        papers={name: method.paper for name, method in METHODS.items()},
    )
    for place in exported.removed:
        print(printable(f"removed a path of this machine: {place}"))
    for path in sorted(exported.folder.iterdir()):
        print(f"wrote {path}")
    print(f"weights {exported.weights_sha256}")
    print("next: read README.md, the model card, before you share it")


def _stock(args):
    from nnssl_plugin.checkpoints.sharing.stock import export_stock

    model = export_stock(args.w, args.o, archive=args.zip)
    print(f"wrote {model.folder} ({', '.join(model.folds)})")
    if model.zip is not None:
        print(f"wrote {model.zip}\nthere: nnUNetv2_install_pretrained_model_from_zip {model.zip.name}")
    folds = " ".join(fold.removeprefix("fold_") for fold in model.folds)
    print(f"next: nnUNetv2_predict_from_modelfolder -m {model.folder} -f {folds} -i IN -o OUT")
