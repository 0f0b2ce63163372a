"""Folds: of a dataset with class labels, and further ones with fewer labels.

    nnssl_plugin split -d 511
    nnssl_plugin split -d 7 -f 0 --fractions 20 40 60 80 100

Without --fractions: writes the five folds of a classification dataset (stratified by class, no subject on both sides),
or checks those that are there, and shows them.

With --fractions: appends one fold per percentage, nested subsets of the training cases of fold 0 with the same
validation cases. Folds that are there stay as they are, and asking again adds nothing. Any trainer, nnU-Net's own
included, then takes the printed fold numbers. Subjects are drawn with all of their cases: those of the dataset's
classification.csv, or of --subjects.
"""


def add_arguments(parser):
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or full name")
    parser.add_argument("-f", type=int, default=0, metavar="FOLD", help="fold to cut down (default: 0)")
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        metavar="PERCENT",
        help="of the fold's training cases, for example 20 40 60 80 100",
    )
    parser.add_argument(
        "--subjects", metavar="FILE", help="table case,subject (default: the dataset's classification.csv, if any)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the subjects (default: 0)")


def run(args):
    from nnssl_plugin.tasks.classification.folds import dataset_class_splits, has_class_labels

    classification = has_class_labels(args.d)
    if args.fractions is None or classification:  # nnU-Net's own folds would ignore classes and subjects
        splits, labels = dataset_class_splits(args.d)
    if args.fractions is None:
        _show_class_folds(args.d, splits, labels)
    else:
        _append_fractions(args)


def _show_class_folds(dataset, splits, labels):
    from nnssl_plugin.nnunet.plans import dataset_folder
    from nnssl_plugin.nnunet.splits import SPLITS_FILE

    print(f"{dataset_folder(dataset) / SPLITS_FILE}:\n\nfold  training  validation  validation cases per class")
    for number, fold in enumerate(splits):
        chosen = set(fold["val"])
        counts = [
            f"{name} {len(chosen.intersection(labels.cases_of_class(target, index)))}"
            for target in labels.targets
            for index, name in enumerate(target.classes)
        ]
        print(f"{number:>4}  {len(fold['train']):>8}  {len(fold['val']):>10}  {', '.join(counts)}")


def _append_fractions(args):
    from nnssl_plugin.nnunet.label_fractions import read_fraction_folds, write_fraction_folds
    from nnssl_plugin.nnunet.plans import dataset_folder
    from nnssl_plugin.nnunet.splits import SPLITS_FILE

    folds = write_fraction_folds(
        args.d,
        fold=args.f,
        fractions=[p / 100 for p in args.fractions],
        seed=args.seed,
        subjects=args.subjects,
    )
    folder = dataset_folder(args.d)
    entries = {entry.fold: entry for entry in read_fraction_folds(folder)}
    print(f"{folder / SPLITS_FILE}, from fold {args.f}:\n\nfold  labels  training  validation")
    for number in folds.values():
        entry = entries[number]
        print(f"{number:>4}  {entry.fraction:>6.0%}  {entry.training_cases:>8}  {entry.validation_cases:>10}")
    print(f"\nTrain one of them, with any trainer and plan:\nnnUNetv2_train {args.d} 3d_fullres {min(folds.values())}")
