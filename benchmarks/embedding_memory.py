"""Resident memory while a folder of many small images is embedded: one number for every commit.

    OMP_NUM_THREADS=1 python benchmarks/embedding_memory.py CHECKPOINT WORK_FOLDER --images 10000 --side 16

The images are generated, of the spacing of the checkpoint's plan. Memory is that of the process that writes the index;
the processes that read come on top, each with as much at the end as after its first images (``readers_mib``).
"""

import argparse
import json
import os
import time
from pathlib import Path

import nibabel
import numpy as np
import torch

from nnssl_plugin.features.pretrained_backbone import load_backbone
from nnssl_plugin.tasks.retrieval import embedding
from nnssl_plugin.tasks.retrieval.embedding import embed_images


def main() -> None:
    """Generate what is missing, embed, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=16, help="voxels along each axis")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between commits")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    generate(args.work / "images", args.images, args.side, load_backbone(args.checkpoint).spacing)
    embedding.SECONDS = args.every
    append, seen, started = embedding.StoreWriter.append, [], time.perf_counter()

    def measured(store, vectors, rows):
        append(store, vectors, rows)
        seen.append((time.perf_counter() - started, store.rows, resident(os.getpid()), readers()))

    embedding.StoreWriter.append = measured
    done = embed_images(args.work / "images", args.work / "index", args.checkpoint, processes=args.processes)
    seconds, images, memory, of_readers = zip(*seen, strict=True)
    half = len(memory) // 2
    print(
        json.dumps(
            {
                "images": done.rows,
                "side": args.side,
                "images_per_second": done.images_per_second,
                "mib_after_first_commit": memory[0],
                "mib_at_half": memory[half],
                "mib_at_the_end": memory[-1],
                "mib_per_1000_images_in_the_second_half": 1000 * np.polyfit(images[half:], memory[half:], 1)[0],
                "readers_mib": [of_readers[0], of_readers[half], of_readers[max(half, len(of_readers) - 2)]],
                "seconds": [round(each, 1) for each in seconds],
                "images_at_commits": images,
                "mib_at_commits": [round(each, 1) for each in memory],
            },
            indent=2,
        )
    )


def generate(folder: Path, number: int, side: int, spacing) -> None:
    """Images of noise, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*reversed(spacing), 1.0])
    for case in range(number):
        path = folder / f"c{case:05d}_0000.nii.gz"
        if not path.is_file():
            voxels = np.random.default_rng(case).integers(0, 255, (side, side, side), dtype=np.uint8)
            nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def resident(process: int) -> float:
    """Resident MiB of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def readers() -> list[float]:
    """Resident MiB of the processes that this one has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sorted((round(resident(int(child)), 1) for child in children), reverse=True)


if __name__ == "__main__":
    main()
