"""Make an index of embeddings: one vector per image, by the encoder of any checkpoint.

    nnssl_plugin embed -m CHECKPOINT -i IMAGES -o INDEX
    nnssl_plugin embed -m MODEL_FOLDER -d 501 -o INDEX --rows lesion --metadata patients.csv -device cuda
    nnssl_plugin embed -m MED3DINSIGHT_CHECKPOINT -i IMAGES -o INDEX --aligned

Images are named as for nnU-Net (CASE_0000.nii.gz, one file per channel) and preprocessed as in training. --metadata is
a table with the column case and any others; subject says which cases are of one patient, so that none finds itself. The
same command goes on after an interruption. A case that cannot be used is named and left out; the exit code is then 1.
With --aligned, vectors lie in the space of the texts that the pretraining aligned volumes with, for search --text; the
dataset with these texts is looked for in nnUNet_raw.
"""

FAILED = 1


def add_arguments(parser):
    parser.add_argument(
        "-m", required=True, metavar="MODEL", help="checkpoint, shared folder, or TRAINER__PLANS__CONFIG"
    )
    parser.add_argument("-o", required=True, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "--rows",
        choices=("case", "window", "lesion"),
        default="case",
        help="what a vector stands for (default: case)",
    )
    parser.add_argument(
        "--view",
        choices=("windows", "whole"),
        default="windows",
        help="windows that cover the image, pooled inside the body, or the whole image fitted into one "
        "(default: windows)",
    )
    parser.add_argument("--aligned", action="store_true", help="vectors in the space of texts, for search --text")
    add_image_arguments(parser)


def add_image_arguments(parser):
    """Flags of ``embed`` and of ``index add``."""
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("-i", metavar="DIR", help="folder of images")
    images.add_argument("-d", metavar="ID", help="raw dataset: its training images, class labels and segmentations")
    parser.add_argument("--metadata", metavar="CSV", help="table with the column case, perhaps subject, and any others")
    parser.add_argument("-seg", metavar="DIR", help="segmentations (CASE.nii.gz), for --rows lesion")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows of one pass (default: 4)")
    parser.add_argument(
        "-np", type=int, default=2, metavar="N", help="processes that read images beside this one (default: 2)"
    )
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build a network of any class; only for a model whose author you know and trust",
    )


def run(args):
    how = {"alignments": alignment_of} if args.aligned else {}
    return embed(args, args.m, args.o, rows=args.rows, view=args.view, **how)


def alignment_of(method):
    """What makes the alignment of a method with texts, by the method's name."""
    from importlib import import_module

    from nnssl_plugin.errors import UserError
    from nnssl_plugin.registry import METHODS

    aligned = {name: entry.alignment for name, entry in METHODS.items() if entry.alignment}
    if method not in aligned:
        titles = ", ".join(METHODS[name].title for name in aligned)
        raise UserError(
            f"The weights come from {METHODS[method].title if method in METHODS else method or 'an unknown training'}, "
            "which does not align volumes with texts.",
            f"Leave --aligned out, or take a checkpoint of: {titles}.",
        )
    module, _, function = aligned[method].rpartition(".")
    return getattr(import_module(module), function)


def embed(args, model, folder, **how):
    """Embed what the flags name, and say what was done."""
    from nnssl_plugin.tasks.retrieval.embedding import embed_images

    images, metadata, segmentations = _sources(args)
    done = embed_images(
        images,
        folder,
        model,
        metadata=metadata,
        segmentations=segmentations,
        device=args.device,
        batch_size=args.batch_size,
        processes=args.np,
        trust=args.trust,
        **how,
    )
    for case, reasons in done.warnings.items():
        print(f"{case}: {'; '.join(reasons)}")
    for case, reason in done.failed.items():
        print(f"{case}: left out, {reason}.")
    print(
        f"{done.folder}: {done.done} cases embedded ({done.images_per_second:.2f} images/s), {done.skipped} were "
        f"there, {len(done.failed)} left out; {done.rows} vectors."
    )
    if done.drift is not None:
        print(
            f"Drift: the new vectors lie {done.drift:.2f} standard deviations from those that the index was built of."
        )
        if done.drift > 1:
            print("They are of another kind: distances among them say less. An index of its own suits them better.")
    return FAILED if done.failed else 0


def _sources(args):
    """Folder of images, case → cells, folder of segmentations."""
    from nnssl_plugin.nnunet.case_labels import LABELS_FILE, read_table
    from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder
    from nnssl_plugin.nnunet.subjects import SUBJECTS_FILE

    images, tables, segmentations = args.i, [args.metadata] if args.metadata else [], args.seg
    if args.d is not None:
        raw = raw_dataset_folder(args.d)
        images, segmentations = raw / "imagesTr", args.seg or raw / "labelsTr"
        tables = [*(raw / name for name in (SUBJECTS_FILE, LABELS_FILE) if (raw / name).is_file()), *tables]
    metadata = {}
    for table in tables:
        for row in read_table(table):
            metadata.setdefault(row["case"], {}).update(row)
    return images, metadata, segmentations
