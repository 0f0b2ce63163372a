"""Embedding a folder of images beside bare forward passes over the same windows: images per second, and memory.

    OMP_NUM_THREADS=1 python benchmarks/embedding_throughput.py CHECKPOINT IMAGES --repeat 10 --processes 1

Every image is linked ``--repeat`` times, so that a small folder makes a long run. The bare pass has all windows in
memory and computes the encoder's maps alone, in batches of the same size; both take turns. The processes that read take
some seconds to start, which a short run does not see pay off: ``steady`` leaves the time to the first commit out.
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    embedding.SECONDS = 1.0
    encoder = load_encoder(args.checkpoint, device=args.device)
    files, _ = find_images(args.images, encoder.backbone.preprocessing.file_ending)
    windows, reading = all_windows(encoder, files)
    found = {"bare": [], "embed": [], "steady": []}
    memory = []
    for _ in range(args.rounds):
        found["bare"].append(len(files) / bare_seconds(encoder, windows, args))
        with tempfile.TemporaryDirectory() as folder:
            rate, commits = embedded(args, files, Path(folder))
        found["embed"].append(rate)
        found["steady"].append(steady(commits))
        memory = [used for *_, used in commits]
    print(
        json.dumps(
            {
                "images": len(files) * args.repeat,
                "windows_per_image": len(windows) / len(files),
                "patch": list(windows.shape[2:]),
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "processes": args.processes,
                "milliseconds_to_read_an_image": reading,
                "images_per_second": found,
                "ratios": {
                    name: [a / b for a, b in zip(found[name], found["bare"], strict=True)]
                    for name in ("embed", "steady")
                },
                "resident_mib_at_commits": memory,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
            indent=2,
        )
    )


def all_windows(encoder, files) -> tuple[torch.Tensor, float]:
    """(W, C, *patch): the windows of every image, each image once; and the CPU's milliseconds to read one."""
    found, seconds = [], 0.0
    for case, each in files.items():
        started = time.process_time()
        prepared = prepare_case(case, each, encoder.backbone.preprocessing)
        seconds += time.process_time() - started
        (row,) = prepared.rows
        found += [cut(prepared, row, number, encoder.backbone.patch_size)[0] for number in range(len(row.places))]
    return torch.from_numpy(np.stack(found)), 1000 * seconds / len(files)


@torch.no_grad()
def bare_seconds(encoder, windows: torch.Tensor, args) -> float:
    """Seconds that the encoder alone takes for all windows; on a GPU in half precision where that embeds so, too."""
    on_device = windows.to(args.device)
    for number in (1, args.repeat):
        started = time.perf_counter()
        for _ in range(number):
            for batch in on_device.split(args.batch_size):
                with torch.autocast(args.device, enabled=args.device == "cuda"):
                    encoder.backbone.features(batch)
        if args.device == "cuda":
            torch.cuda.synchronize()
        if args.device == "cpu":
            return (time.perf_counter() - started) / number
    return (time.perf_counter() - started) / number


def embedded(args, files, folder: Path) -> tuple[float, list[tuple[float, int, float]]]:
    """Images per second of ``embed``, and at every commit the time, the vectors by then and the resident MiB."""
    (folder / "images").mkdir()
    for case, each in files.items():
        for copy in range(args.repeat):
            for channel, file in enumerate(each):
                ending = file.name.partition(f"_{channel:04d}")[2]
                (folder / "images" / f"{case}x{copy}_{channel:04d}{ending}").symlink_to(file.resolve())
    commits = []
    append = embedding.StoreWriter.append

    def measured(store, vectors, rows):
        append(store, vectors, rows)
        used = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        commits.append((time.perf_counter(), store.rows, used))

    embedding.StoreWriter.append = measured
    try:
        done = embed_images(
            folder / "images",
            folder / "index",
            args.checkpoint,
            device=args.device,
            batch_size=args.batch_size,
            processes=args.processes,
        )
    finally:
        embedding.StoreWriter.append = append
    return done.images_per_second, commits


def steady(commits) -> float:
    """Images per second between the first and the last commit."""
    (start, first, _), (end, last, _) = commits[0], commits[-1]
    return (last - first) / max(end - start, 1e-9) if last > first else float("nan")


if __name__ == "__main__":
    main()
