"""Choose a slice per case, describe it, and store the frozen embeddings of slices and texts.

    nnssl_plugin caption -d 501 --captioner template --body-part hippocampus
    nnssl_plugin caption -d 501 --model ViT-B-32 --weights /models/open_clip_vit_b_32.safetensors

Writes triplets.jsonl and clip_embeddings.npz into the raw dataset. Lines that another captioner (or you) wrote stay;
running it again adds the new cases and embeds what has changed. Without --weights the encoders are random: they only
tell slices apart. The network is read only where --weights is a tag of open_clip.
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or full name")
    parser.add_argument("--captioner", choices=("template",), default="template", help="who writes (default: template)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the slices (default: 0)")
    parser.add_argument("--body-part", metavar="TEXT", help='goes into the texts, for example "abdomen"')
    parser.add_argument("--weights", metavar="WHERE", help="file, folder or open_clip tag of the frozen encoders")
    parser.add_argument("--model", metavar="NAME", help="open_clip's architecture of a file or tag, e.g. ViT-B-32")


def run(args):
    import logging

    from nnssl_plugin.captions.captioners import CAPTIONERS
    from nnssl_plugin.captions.embeddings import store_embeddings
    from nnssl_plugin.captions.triplets import caption_dataset
    from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = raw_dataset_folder(args.d)
    captions = caption_dataset(folder, CAPTIONERS[args.captioner](), seed=args.seed, body_part=args.body_part)
    print(f"{captions.path}: {captions.added} texts written, {captions.kept} kept.")
    embeddings = store_embeddings(folder, model=args.model, weights=args.weights)
    print(f"{embeddings.path}: {embeddings.computed} embedded, {embeddings.reused} reused, by {embeddings.weights}.")
