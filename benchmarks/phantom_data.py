"""Generated anatomy of many small structures: the bed of benchmarks/studies/small-structures-2d.json.

    python benchmarks/phantom_data.py -o DATA -n 120

writes ``DATA/small_structures/{images,labels}``: trunks of 48×64×64 voxels at 4 mm, each seen with one contrast, a
bias field and noise. Eight labels: heart, what the stomach holds, spleen, spinal canal, aorta, vena cava, kidneys.
"""

import argparse
from pathlib import Path

from nnssl_plugin.quickstart.phantoms import ORGANS, write_phantoms

NAMES = ("heart", "stomach_content", "spleen", "canal", "aorta", "cava", "left_kidney", "right_kidney")
PLACES = (4, 6, 7, 9, 10, 11, 13, 14)
"""Of the named structures among the package's organs."""
SHAPE, SPACING = (48, 64, 64), (4.0, 4.0, 4.0)


def organs() -> tuple:
    """The package's organs, the named ones labelled 1, 2, …, all others background."""
    labels = {place: label for label, place in enumerate(PLACES, 1)}
    return tuple(organ._replace(label=labels.get(place, 0)) for place, organ in enumerate(ORGANS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True, type=Path, help="folder of data, for label_efficiency.py --data")
    parser.add_argument("-n", type=int, default=120, help="subjects (default: 120)")
    args = parser.parse_args()
    folder = args.o / "small_structures"
    images = write_phantoms(
        folder / "images",
        args.n,
        seed=14,
        shape=SHAPE,
        spacing_mm=SPACING,
        labels_folder=folder / "labels",
        organs=organs(),
    )
    for path in images:
        path.rename(path.with_name(path.name.replace("_0000.nii.gz", ".nii.gz")))
    print(f"{len(images)} subjects in {folder}")


if __name__ == "__main__":
    main()
