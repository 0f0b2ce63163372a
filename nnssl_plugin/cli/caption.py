"""Choose slices of every case, describe them, and store the frozen embeddings of slices and texts.

    nnssl_plugin caption -d 501 --body-part hippocampus
    nnssl_plugin caption -d 501 --model ViT-B-32 --weights /models/open_clip_vit_b_32.safetensors
    nnssl_plugin caption -d 501 --captioner my_package.llm:Describer --set temperature=0.2

Writes triplets.jsonl and clip_embeddings.npz into the raw dataset. Lines that another captioner (or you) wrote stay;
running it again adds new cases and slices and embeds what has changed. Without --weights the encoders are random: they
only tell slices apart. The network is read only where --weights is a tag of open_clip. No scan leaves this computer,
unless you choose a captioner that asks a host and name that host: --set host=HOST
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or full name")
    parser.add_argument("--slices", type=int, default=8, metavar="N", help="slices per case (default: 8)")
    parser.add_argument(
        "--captioner", default="template", metavar="NAME", help="template (default), or your own: package.module:Class"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="options of the captioner, e.g. size=false",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the slices (default: 0)")
    parser.add_argument("--body-part", metavar="TEXT", help='goes into the texts, for example "abdomen"')
    parser.add_argument("--weights", metavar="WHERE", help="file, folder or open_clip tag of the frozen encoders")
    parser.add_argument("--model", metavar="NAME", help="open_clip's architecture of a file or tag, e.g. ViT-B-32")


def run(args):
    import logging

    from nnssl_plugin.captions.captioners import open_captioner
    from nnssl_plugin.captions.embeddings import store_embeddings
    from nnssl_plugin.captions.triplets import caption_dataset
    from nnssl_plugin.data.triplets import describe_encoders
    from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = raw_dataset_folder(args.d)
    options = dict(map(_option, args.options))
    captioner = open_captioner(args.captioner, options)
    if options.get("host"):
        print(f"Slices are sent to {options['host']}, as you asked.")
    captions = caption_dataset(folder, captioner, seed=args.seed, slices=args.slices, body_part=args.body_part)
    print(f"{captions.path}: {captions.added} texts written, {captions.kept} kept.")
    embeddings = store_embeddings(folder, model=args.model, weights=args.weights)
    print(f"{embeddings.path}: {embeddings.computed} embedded, {embeddings.reused} reused.")
    print(f"Made by {describe_encoders(folder, embeddings.weights)}.")


def _option(text):
    """``key=value``; the value is JSON where it parses, else the text."""
    import json

    from nnssl_plugin.errors import UserError

    key, separator, value = text.partition("=")
    if not (separator and key):
        raise UserError(f"--set {text}: an option reads KEY=VALUE.", "For example: --set size=false")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
