"""Lay out the hippocampus study of docs/results.md: 160 unlabelled scans, and 20 labelled cases beside 40 others.

    python benchmarks/hippocampus_data.py -i HIPPOCAMPUS -o unlabelled -d 502

``HIPPOCAMPUS`` holds ``images/`` and ``labels/`` of Medical Segmentation Decathlon Task04 (one file per case under the
same name). In the order of their names every fifth case is for evaluation; of the others all are pretraining scans
(without their labels) and every eighth is a labelled training case. nnUNet_raw and nnUNet_preprocessed must be set.
"""

import argparse
import os
import shutil
from pathlib import Path

from nnssl_plugin.io.files import write_json

NAME = "HippocampusLabelled"


def split(cases: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Names of the pretraining, labelled training, and evaluation cases."""
    evaluation = sorted(cases)[::5]
    others = [case for case in sorted(cases) if case not in evaluation]
    return others, others[::8], evaluation


def write_labelled(source: Path, dataset: str, training: list[str], evaluation: list[str]) -> None:
    """The raw nnU-Net dataset of the labelled cases, and its one fold."""
    raw = Path(os.environ["nnUNet_raw"]) / dataset
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for case in (*training, *evaluation):
        shutil.copyfile(source / "images" / f"{case}.nii.gz", raw / "imagesTr" / f"{case}_0000.nii.gz")
        shutil.copyfile(source / "labels" / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz")
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "anterior": 1, "posterior": 2},
            "numTraining": len(training) + len(evaluation),
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "NibabelIOWithReorient",
        },
    )
    folds = Path(os.environ["nnUNet_preprocessed"]) / dataset / "splits_final.json"
    write_json(folds, [{"train": training, "val": evaluation}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, type=Path, help="folder with images/ and labels/")
    parser.add_argument("-o", required=True, type=Path, help="folder for the unlabelled scans (links)")
    parser.add_argument("-d", required=True, type=int, help="ID of the labelled dataset")
    args = parser.parse_args()
    cases = [path.name.removesuffix(".nii.gz") for path in (args.i / "images").glob("*.nii.gz")]
    pretraining, training, evaluation = split(cases)
    args.o.mkdir(parents=True, exist_ok=True)
    for case in pretraining:
        link = args.o / f"{case}.nii.gz"
        if not link.exists():
            link.symlink_to((args.i / "images" / link.name).resolve())
    write_labelled(args.i, f"Dataset{args.d:03d}_{NAME}", training, evaluation)
    print(f"{len(pretraining)} unlabelled scans, {len(training)} labelled cases, {len(evaluation)} for evaluation")


if __name__ == "__main__":
    main()
