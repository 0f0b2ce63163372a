"""Embedding a folder of images beside bare forward passes over the same windows: images per second, and memory.

    OMP_NUM_THREADS=1 python benchmarks/embedding_throughput.py CHECKPOINT IMAGES --repeat 10

Every image is linked ``--repeat`` times, so that a small folder makes a long run. The bare pass has all windows in
memory and computes the encoder's maps alone, in batches of the same size; both take turns.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nnssl_plugin.data.images import find_images
from nnssl_plugin.tasks.retrieval import embedding
from nnssl_plugin.tasks.retrieval.embedding import embed_images
from nnssl_plugin.tasks.retrieval.encoder import load_encoder
from nnssl_plugin.tasks.retrieval.inputs import cut, prepare_case


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    encoder = load_encoder(args.checkpoint)
    files, _ = find_images(args.images, encoder.backbone.file_ending)
    windows = all_windows(encoder, files)
    rates = {"embed": [], "bare": []}
    memory = []
    for _ in range(args.rounds):
        rates["bare"].append(len(files) / bare_seconds(encoder, windows, args.batch_size))
        with tempfile.TemporaryDirectory() as folder:
            rate, used = embedded(args, files, Path(folder))
        rates["embed"].append(rate)
        memory.append(used)
    best = {name: max(each) for name, each in rates.items()}
    print(
        json.dumps(
            {
                "images": len(files) * args.repeat,
                "windows_per_image": len(windows) / len(files),
                "images_per_second": best,
                "ratio": best["embed"] / best["bare"],
                "ratios": [a / b for a, b in zip(rates["embed"], rates["bare"], strict=True)],
                "resident_mib_at_commits": memory[-1],
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
            indent=2,
        )
    )


def all_windows(encoder, files) -> torch.Tensor:
    """(W, C, *patch): the windows of every image, each image once."""
    found = []
    for case, each in files.items():
        prepared = prepare_case(case, each, encoder.backbone)
        (row,) = prepared.rows
        found += [cut(prepared, row, number, encoder.backbone.patch_size)[0] for number in range(len(row.places))]
    return torch.from_numpy(np.stack(found))


@torch.no_grad()
def bare_seconds(encoder, windows: torch.Tensor, batch_size: int) -> float:
    """Seconds that the encoder alone takes for all windows."""
    started = time.perf_counter()
    for batch in windows.split(batch_size):
        encoder.backbone.features(batch)
    return time.perf_counter() - started


def embedded(args, files, folder: Path) -> tuple[float, list[float]]:
    """Images per second of ``embed``, and the resident memory in MiB at every commit."""
    (folder / "images").mkdir()
    for case, each in files.items():
        for copy in range(args.repeat):
            for channel, file in enumerate(each):
                ending = file.name.partition(f"_{channel:04d}")[2]
                (folder / "images" / f"{case}x{copy}_{channel:04d}{ending}").symlink_to(file.resolve())
    used = []
    append = embedding.StoreWriter.append

    def measured(store, vectors, rows):
        append(store, vectors, rows)
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)

    embedding.StoreWriter.append = measured
    try:
        done = embed_images(
            folder / "images",
            folder / "index",
            args.checkpoint,
            batch_size=args.batch_size,
            threads=args.threads,
        )
    finally:
        embedding.StoreWriter.append = append
    return done.images_per_second, used


if __name__ == "__main__":
    main()
