"""Fine-tune a pair of image and text encoders on the slices and texts of a dataset, then store their embeddings.

    nnssl_plugin caption -d 501 --body-part hippocampus
    nnssl_plugin clip -d 501 --model ViT-B-32 --weights clip_vit_b_32.safetensors -device cuda

Some cases are held out; it prints how well their slices and texts find each other, before and after. The pair goes to
clip_pair in the raw dataset (reuse it elsewhere with --weights FOLDER), the embeddings of all slices and texts to
clip_embeddings.npz. Interrupted, the same command goes on. Without --weights a small pair is trained from scratch: it
knows nothing but these slices and texts. The network is read only where --weights is a tag of open_clip.
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or full name")
    parser.add_argument("--weights", metavar="WHERE", help="file, folder or open_clip tag to start from")
    parser.add_argument("--model", metavar="NAME", help="open_clip's architecture of a file or tag, e.g. ViT-B-32")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 30; 100 from scratch")
    parser.add_argument("--lr", type=float, metavar="X", help="default: 1e-5; 5e-4 from scratch")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 64")
    parser.add_argument("--patience", type=int, metavar="N", help="epochs without gain before it stops (default: 10)")
    parser.add_argument("--holdout", type=float, metavar="SHARE", help="share of the cases held out (default: 0.1)")
    parser.add_argument("--seed", type=int, metavar="N", help="draws held-out cases and order (default: 0)")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def run(args):
    import logging

    from nnssl_plugin.captions.clip.fine_tuning import fine_tune_pair
    from nnssl_plugin.captions.embeddings import store_embeddings
    from nnssl_plugin.data.triplets import describe_encoders
    from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder
    from nnssl_plugin.statistics.ranking import retrieval_table

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nnssl_plugin").setLevel(logging.INFO)
    folder = raw_dataset_folder(args.d)
    names = ("epochs", "lr", "batch_size", "patience", "holdout", "seed")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    tuned = fine_tune_pair(folder, model=args.model, weights=args.weights, device=args.device, **changes)
    print("\n".join(retrieval_table({"before": tuned.before, "after": tuned.after, "chance": tuned.chance})))
    kept = f"epoch {tuned.best_epoch} of {tuned.epochs}" if tuned.best_epoch else "the pair as it was: no epoch gained"
    done = "was trained before with these settings" if tuned.was_there else "trained"
    print(f"{tuned.folder}: {done} on {tuned.pairs - tuned.held_out} pairs, {tuned.held_out} held out; kept: {kept}.")
    embeddings = store_embeddings(folder, weights=str(tuned.folder), device=args.device)
    print(f"{embeddings.path}: {embeddings.computed} embedded, {embeddings.reused} reused.")
    print(f"Made by {describe_encoders(folder, embeddings.weights)}.")
