"""How fast ``prepare`` is: many small scans and a few large ones, files and voxels per second, and the largest process.

    python benchmarks/prepare_speed.py
    python benchmarks/prepare_speed.py --files 10000 --edge 16 --processes 2

Random scans are written to a temporary folder, then the command runs on them, once to take them all and once more to
find nothing new. Noise is no scan: the estimates of ``nnssl_plugin/intake/preview.py`` are rounded
from real ones.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np


def main() -> None:
    """Measure and print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="how many scans (default: 1000)")
    parser.add_argument("--edge", type=int, default=16, help="voxels along their edges (default: 16)")
    parser.add_argument("--processes", type=int, default=2, help="worker processes (default: 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scans, raw = Path(folder, "scans"), Path(folder, "raw")
        raw.mkdir()
        write_scans(scans, options.files, options.edge)
        command = ["prepare", "-i", str(scans), "-d", "1", "-n", "Speed", "-np", str(options.processes)]
        for what in ("all new", "all known"):
            seconds = run(command, raw)
            voxels = options.files * options.edge**3
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(
                f"{what}: {seconds:.1f} s, {options.files / seconds:.0f} files/s, {voxels / seconds / 1e6:.2f} million "
                f"voxels/s, largest process {memory:.0f} MiB"
            )


def write_scans(folder: Path, files: int, edge: int) -> None:
    """Noise in a frame of air, as int16, a hundred scans to a folder."""
    rng = np.random.default_rng(0)
    for number in range(files):
        path = folder / f"{number // 100:04d}" / f"{number:06d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.pad(rng.integers(50, 1000, (edge - 4,) * 3), 2).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def run(command: list[str], raw: Path) -> float:
    """Seconds that the command takes."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "nnssl_plugin.cli.main", *command],
        env={**os.environ, "nnUNet_raw": str(raw)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
