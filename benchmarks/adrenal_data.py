"""Lay out AdrenalMNIST3D (MedMNIST v2) for classification: NIfTI volumes and a table for each official split.

    python benchmarks/adrenal_data.py -i adrenalmnist3d_trainval.npz -o adrenal
    nnssl_plugin prepare -i adrenal/train --class-labels adrenal/train.csv -d 511 -n Adrenal --modality noNorm

The volumes are binary shapes, which a z-score inside their own mask would make constant. The archive holds 0 and 255;
0 and 1 are written, as what is not normalised is what a masked autoencoder has to restore.
The official training split is what folds are made of. The official validation split is kept apart as the test set
(``adrenal/test``, ``adrenal/test.csv``, for ``nnssl_plugin classify``). The archive does not say which volumes belong
to one patient, so every volume is its own subject, nor how large a voxel is: 1 mm is written.
"""

import argparse
import csv
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.scans import stored_bytes

CLASSES = ("normal", "hyperplasia")
"""Of MedMNIST's labels 0 and 1 (hyperplasia stands for hyperplasia and masses)."""
SPLITS = {"train": ("train", ""), "val": ("test", "_0000")}
"""Official split → what it is here, and what its files add to the case: ``classify`` reads channels from the name."""


def write_split(archive, official: str, folder: Path, *, channel: str) -> int:
    """Volumes ``CASE`` + ``channel`` below ``folder``, and ``folder``.csv beside it; returns their number."""
    images, labels = archive[f"{official}_images"], archive[f"{official}_labels"].ravel()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (volume, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{official}_{number:04d}"
        with atomic_path(folder / f"{name}{channel}.nii.gz") as temporary:
            temporary.write_bytes(stored_bytes(nibabel.Nifti1Image((volume > 0).astype(np.uint8), np.eye(4))))
        rows.append((name, CLASSES[int(label)]))
    with atomic_path(folder.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "diagnosis"), *rows])
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, type=Path, help="adrenalmnist3d_trainval.npz")
    parser.add_argument("-o", required=True, type=Path, help="folder to write")
    args = parser.parse_args()
    with np.load(args.i, allow_pickle=False) as archive:
        counts = {
            name: write_split(archive, official, args.o / name, channel=channel)
            for official, (name, channel) in SPLITS.items()
        }
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"volumes in {args.o}")


if __name__ == "__main__":
    main()
