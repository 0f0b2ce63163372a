"""Embedding a folder of images beside bare forward passes over the same windows: images per second, and memory.

    OMP_NUM_THREADS=1 python benchmarks/embedding_throughput.py CHECKPOINT IMAGES --repeat 10 --processes 1

Every image is linked ``--repeat`` times, so that a small folder makes a long run. The bare pass has all windows in
memory and computes the encoder's maps alone, in batches of the same size; both take turns. The processes that read take
some seconds to start, which a short run does not see pay off: ``steady`` leaves the time to the first commit out.
``processor`` is by the processor's time of this process alone: what embedding costs it beside the bare pass, where the
processes that read keep up. All of these compare minutes with other minutes, in which a machine may be faster or
slower. ``in_turns`` does not: in one more run every batch goes through the encoder alone first, and then through
``embed``, which is charged with all that is left of the time.
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
from nnssl_plugin.tasks.retrieval.encoder import Encoder, load_encoder
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
    encoder = load_encoder(args.checkpoint, device=args.device)
    files, _ = find_images(args.images, encoder.backbone.preprocessing.file_ending)
    windows, reading = all_windows(encoder, files)
    found = {"bare": [], "embed": [], "steady": [], "processor_bare": [], "processor_embed": []}
    memory, turns = [], []
    for _ in range(args.rounds):
        used = time.process_time()
        passes, seconds = bare(encoder, windows, args)
        found["bare"].append(len(files) / seconds)
        found["processor_bare"].append(passes * len(files) / (time.process_time() - used))
        with tempfile.TemporaryDirectory() as folder:
            rate, commits = embedded(args, files, Path(folder))
        found["embed"].append(rate)
        found["steady"].append(steady(commits, 0))
        found["processor_embed"].append(steady(commits, 1))
        memory = [used for *_, used in commits]
        with tempfile.TemporaryDirectory() as folder:
            turns.append(in_turns(args, files, Path(folder)))
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
                    name: [a / b for a, b in zip(found[mine], found[bare_one], strict=True)]
                    for name, mine, bare_one in (
                        ("embed", "embed", "bare"),
                        ("steady", "steady", "bare"),
                        ("processor", "processor_embed", "processor_bare"),
                    )
                }
                | {"in_turns": turns},
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
def bare(encoder, windows: torch.Tensor, args) -> tuple[int, float]:
    """How often all windows went through the encoder alone, and the seconds of one time (on a GPU the first pass warms
    up and is left out); on a GPU in half precision, as it embeds there."""
    on_device, cuda = windows.to(args.device), args.device == "cuda"
    for number in (1, args.repeat) if cuda else (1,):
        started = time.perf_counter()
        for _ in range(number):
            for batch in on_device.split(args.batch_size):
                with torch.autocast(args.device, enabled=cuda):
                    encoder.backbone.features(batch)
        if cuda:
            torch.cuda.synchronize()
    return number + cuda, (time.perf_counter() - started) / number


def embedded(args, files, folder: Path) -> tuple[float, list[tuple[float, float, int, float]]]:
    """Images per second of ``embed``, and at every commit time, processor's time, vectors and resident MiB."""
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
        commits.append((time.perf_counter(), time.process_time(), store.rows, used))

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


def in_turns(args, files, folder: Path) -> float:
    """Seconds of the encoder alone over those of the rest, between the first commit and the last."""
    alone, at_commits = [0.0], []
    read, append = Encoder.read, embedding.StoreWriter.append

    def after_the_encoder(encoder, data, inside):
        started = time.perf_counter()
        with torch.no_grad(), torch.autocast(args.device, enabled=args.device == "cuda"):
            encoder.backbone.features(data.to(args.device))
        if args.device == "cuda":
            torch.cuda.synchronize()
        alone[0] += time.perf_counter() - started
        return read(encoder, data, inside)

    def measured(store, vectors, rows):
        at_commits.append((time.perf_counter(), alone[0]))
        append(store, vectors, rows)

    Encoder.read, embedding.StoreWriter.append = after_the_encoder, measured
    try:
        embedded(args, files, folder)
    finally:
        Encoder.read, embedding.StoreWriter.append = read, append
    (first, before), (last, after) = at_commits[0], at_commits[-1]
    return (after - before) / (last - first - (after - before))


def steady(commits, clock: int) -> float:
    """Images per second between the first and the last commit, by the time (0) or the processor's (1)."""
    first, last = commits[0], commits[-1]
    return (last[2] - first[2]) / max(last[clock] - first[clock], 1e-9) if last[2] > first[2] else float("nan")


if __name__ == "__main__":
    main()
