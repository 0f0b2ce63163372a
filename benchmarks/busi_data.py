"""The table of class labels of the breast ultrasound images (benign, malignant, normal).

    python benchmarks/busi_data.py -i busi_us_text -o busi.csv
    nnssl_plugin prepare -i busi_us_text --class-labels busi.csv -d 512 -n BreastUltrasound

``captions.csv`` of the folder names no patients, so every image is its own subject.
"""

import argparse
import csv
from pathlib import Path

from nnssl_plugin.io.files import atomic_path


def labels_of(captions: Path) -> list[tuple[str, str]]:
    """Relative path and class of every image that ``captions.csv`` names and that is there."""
    with captions.open(encoding="utf-8-sig", newline="") as stream:
        rows = [(row["image_path"], row["label"]) for row in csv.DictReader(stream)]
    return [(path, label) for path, label in rows if (captions.parent / path).is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, type=Path, help="folder with captions.csv and the images")
    parser.add_argument("-o", required=True, type=Path, help="table to write")
    args = parser.parse_args()
    rows = labels_of(args.i / "captions.csv")
    with atomic_path(args.o) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("case", "diagnosis"), *rows])
    print(f"{len(rows)} images in {args.o}")


if __name__ == "__main__":
    main()
