"""Choose slices of every case, describe them, and store the frozen embeddings of slices and texts.

    nnssl_plugin caption -d 501 --body-part hippocampus
    nnssl_plugin caption -d 501 --model ViT-B-32 --weights /models/open_clip_vit_b_32.safetensors
    nnssl_plugin caption -d 501 --captioner openai --endpoint http://127.0.0.1:8000/v1 --captioner-model NAME
    nnssl_plugin caption -d 501 --captioner file --texts reports.csv
    nnssl_plugin caption -d 501 --review
    nnssl_plugin caption -d 501 --strike list.csv

Writes triplets.jsonl and clip_embeddings.npz into the raw dataset. Lines that another captioner (or you) wrote stay;
running it again adds new cases and slices, goes on where it was interrupted, and embeds what has changed. Without
--weights the encoders are random: they only tell slices apart. The network is read only where --weights is a tag of
open_clip. No scan leaves this computer, unless you name a server elsewhere and add --allow-remote (openai), or choose a
captioner of your own that asks a host and name that host: --set host=HOST
"""


def add_arguments(parser):
    dataset = parser.add_argument_group("dataset and slices")
    dataset.add_argument("-d", required=True, metavar="ID", help="dataset ID or full name")
    dataset.add_argument("--slices", type=int, default=8, metavar="N", help="slices per case (default: 8)")
    dataset.add_argument("--seed", type=int, default=0, metavar="N", help="draws the slices (default: 0)")
    dataset.add_argument("--body-part", metavar="TEXT", help='goes into the texts, for example "abdomen"')
    dataset.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("CENTRE", "WIDTH"),
        help="in which captioners and --review see slices (default: for CT by the body part, else percentiles)",
    )
    captioner = parser.add_argument_group("who describes")
    captioner.add_argument(
        "--captioner",
        default="template",
        metavar="NAME",
        help="template (default), openai, file, or your own: package.module:Class",
    )
    captioner.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="options of the captioner, e.g. size=false, prompt='…', concurrency=4",
    )
    captioner.add_argument("--texts", metavar="PATH", help="captioner file: a table, or a folder of reports")
    server = parser.add_argument_group("captioner openai: any server with the OpenAI interface and vision")
    server.add_argument("--endpoint", metavar="URL", help="its address, up to /v1")
    server.add_argument("--captioner-model", metavar="NAME", help="the model, as the server knows it")
    server.add_argument("--allow-remote", action="store_true", help="slices may leave this computer")
    server.add_argument(
        "--keep-images", action="store_true", help="keep what is sent in caption_images/ (always with --allow-remote)"
    )
    encoders = parser.add_argument_group("frozen encoders")
    encoders.add_argument("--weights", metavar="WHERE", help="file, folder or open_clip tag of the frozen encoders")
    encoders.add_argument("--model", metavar="NAME", help="open_clip's architecture of a file or tag, e.g. ViT-B-32")
    review = parser.add_argument_group("a person reads the texts").add_mutually_exclusive_group()
    review.add_argument("--review", action="store_true", help="write pages with slices, texts and what is suspicious")
    review.add_argument(
        "--strike", metavar="FILE", help="take a list that such a page saved; nothing learns from these"
    )


def run(args):
    import logging

    from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = raw_dataset_folder(args.d)
    if args.strike:
        return _strike(folder, args.strike)
    if args.review:
        return _review(folder, args.window)
    return _caption(folder, args)


def _caption(folder, args):
    from nnssl_plugin.captions.captioners import open_captioner
    from nnssl_plugin.captions.embeddings import store_embeddings
    from nnssl_plugin.captions.triplets import caption_dataset
    from nnssl_plugin.data.triplets import describe_encoders

    options = _options(folder, args)
    captioner = open_captioner(args.captioner, options)
    if options.get("host"):
        print(f"Slices are sent to {options['host']}, as you asked.")
    captions = caption_dataset(
        folder, captioner, seed=args.seed, slices=args.slices, body_part=args.body_part, window=args.window
    )
    print(f"{captions.path}: {captions.added} texts written, {captions.kept} kept.")
    _print_cost(captions.cost, captioner)
    code = _print_missing(captions)
    _print_contents(folder)
    embeddings = store_embeddings(folder, model=args.model, weights=args.weights)
    print(f"{embeddings.path}: {embeddings.computed} embedded, {embeddings.reused} reused.")
    print(f"Made by {describe_encoders(folder, embeddings.weights)}.")
    return code


def _options(folder, args):
    """What --set says, and the flags that are options of a captioner."""
    options = dict(map(_option, args.options))
    flags = {
        "texts": args.texts,
        "endpoint": args.endpoint,
        "model": args.captioner_model,
        "allow_remote": args.allow_remote,
    }
    options = {**{name: value for name, value in flags.items() if value}, **options}
    if args.keep_images or options.get("allow_remote"):
        options.setdefault("images", str(folder / "caption_images"))
    return options


def _print_cost(cost, captioner):
    if not cost.requests:
        return
    price_in, price_out = (getattr(captioner.options, name, 0) for name in ("price_in", "price_out"))
    price = (cost.tokens_in * price_in + cost.tokens_out * price_out) / 1e6
    priced = f", {price:.2f} at your prices" if price else ""
    print(f"{cost.requests} requests, {cost.tokens_in:,} tokens sent, {cost.tokens_out:,} received{priced}.")


def _print_contents(folder):
    from nnssl_plugin.captions.checks import suspicions
    from nnssl_plugin.captions.overview import count_contents, describe_contents
    from nnssl_plugin.captions.triplets import described_modality
    from nnssl_plugin.data.triplets import read_triplets

    triplets, modality = read_triplets(folder), described_modality(folder)
    for line in describe_contents(count_contents(triplets, modality)):
        print(line)
    suspicious = sum(map(bool, suspicions(triplets, modality)))
    if suspicious:
        print(f"{suspicious} of {len(triplets)} texts are suspicious: nnssl_plugin caption -d {folder.name} --review")


def _print_missing(captions):
    """Tell what got no text; the exit code."""
    from nnssl_plugin.io.text import printable, some

    if captions.unknown:
        print(f"{len(captions.unknown)} cases have no text: {some(captions.unknown)}.")
    if captions.failed:
        print(f"{len(captions.failed)} slices got no text: {printable(some(captions.failed))}. Run the same again.")
    return 1 if captions.failed else 0


def _review(folder, window):
    from nnssl_plugin.captions.review import write_review

    made = write_review(folder, window=window)
    print(f"{made.triplets} texts, {made.suspicious} suspicious, {made.struck} struck. Open in a browser:")
    print(*made.pages, sep="\n")


def _strike(folder, decisions):
    from nnssl_plugin.data.struck import STRUCK_FILE, strike

    struck, taken_back = strike(folder, decisions)
    print(f"{folder / STRUCK_FILE}: {struck} newly struck, {taken_back} taken back.")


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
