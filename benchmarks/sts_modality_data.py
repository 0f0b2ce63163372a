"""The table of a sanity task: which of CT, PET and T1 MR is this volume? Subjects are patients.

    python benchmarks/sts_modality_data.py -i sts_petctmr -o sts_modality.csv
    nnssl_plugin prepare -i sts_petctmr --class-labels sts_modality.csv -d 513 -n Modality

Every patient has all three, so folds by subject are balanced. The masks beside the images are not named, and so not
taken. All volumes get z-score normalisation, which hides the intensity ranges; the textures remain.
"""

import argparse
import csv
from pathlib import Path

from nnssl_plugin.io.files import atomic_path

MODALITIES = ("CT", "PET", "MR_T1")


def modality_rows(source: Path) -> list[tuple[str, str, str]]:
    """Case, subject and modality of every image, sorted."""
    return [
        (f"{patient.name}/{modality}_image.nii.gz", patient.name, modality)
        for patient in sorted(source.iterdir())
        for modality in MODALITIES
        if (patient / f"{modality}_image.nii.gz").is_file()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, type=Path, help="folder with a folder per patient")
    parser.add_argument("-o", required=True, type=Path, help="table to write")
    args = parser.parse_args()
    rows = modality_rows(args.i)
    with atomic_path(args.o) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("case", "subject", "modality"), *rows])
    print(f"{len(rows)} volumes of {len({subject for _, subject, _ in rows})} patients in {args.o}")


if __name__ == "__main__":
    main()
