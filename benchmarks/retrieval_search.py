"""Search in an index of clustered vectors beside FAISS: exact and approximate, time per query, memory, recall.

    OMP_NUM_THREADS=1 python benchmarks/retrieval_search.py WORK_FOLDER --rows 100000 --dimensions 1536

The index is generated: cluster centres on a sphere, vectors around them. FAISS's flat index holds the same standardised
vectors, in memory; ours reads the file, mapped into memory and read once before the clock starts. ``product`` is the
matrix product alone over the same mapped file, which no exact search can do without. Runs take turns, and the best of
each counts. Where FAISS is not installed, exact search is measured without it. With one thread times are those of the
process, so that other work on the machine counts less; with several (OMP_NUM_THREADS and OPENBLAS_NUM_THREADS), of the
clock. Memory (``*_held_gib``, Linux) is what the process holds itself, without the pages of the mapped file, which the
system takes back where it needs them. A million rows take 6 GB of disk twice, and about 13 GB of memory.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nnssl_plugin.data.vector_store import writing
from nnssl_plugin.tasks.retrieval.approximate import load_approximate
from nnssl_plugin.tasks.retrieval.index import Index, load_index
from nnssl_plugin.tasks.retrieval.standardisation import statistics_of

try:
    import faiss
except ImportError:
    faiss = None

QUERIES = (1, 32, 256)
SPREAD = 0.5
"""Standard deviation around a centre, over that of the centres."""


def main() -> None:
    """Generate the index where it is missing, measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-approximate", action="store_true")
    parser.add_argument("--only-generate", action="store_true")
    parser.add_argument("-o", type=Path, help="file for the JSON object, written after each part")
    args = parser.parse_args()
    folder = args.work / f"clustered_{args.rows}_{args.dimensions}"
    if not (folder / "statistics.npy").is_file():
        generate(folder, args.rows, args.dimensions)
    if args.only_generate:
        return
    index = load_index(folder)
    queries = np.array(index.vectors[:: len(index.vectors) // max(QUERIES)][: max(QUERIES)])
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    clock = time.process_time if threads == 1 else time.perf_counter
    found = {"rows": args.rows, "dimensions": args.dimensions, "threads": threads}
    parts = (
        {"exact": exact} if args.without_approximate or faiss is None else {"exact": exact, "approximate": approximate}
    )
    for name, part in parts.items():
        found[name] = part(index, queries, args.repeats, clock)
        if args.o:
            args.o.write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))


def generate(folder: Path, rows: int, dimensions: int) -> None:
    """Clusters of 100 vectors on average."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(rows // 100, 1), dimensions)).astype(np.float32)
    facts = {"dimensions": dimensions, "encoder": {"parts": ["mean", "maximum"]}, "made": {}}
    with writing(folder, facts) as store:
        for start in range(0, rows, 10_000):
            number = min(10_000, rows - start)
            noise = rng.standard_normal((number, dimensions), dtype=np.float32)
            vectors = centres[rng.integers(0, len(centres), number)] + SPREAD * noise
            store.append(vectors, [{"case": f"c{n}", "subject": f"s{n}"} for n in range(start, start + number)])
        store.freeze(statistics_of(store.vectors()))


def exact(index: Index, queries: np.ndarray, repeats: int, clock: Callable[[], float]) -> dict:
    """Seconds per search of ten neighbours, ours, FAISS's and of the product alone; whether the first two agree."""
    _ = index.lengths
    measured: dict = {"ours_held_gib": _held_gib()}
    flat = _flat(index) if faiss else None
    measured["with_faiss_flat_held_gib"] = _held_gib()
    for number in QUERIES:
        some = queries[:number]
        searches = {
            "ours": lambda some=some: index.search(some, 10).rows,
            "product": lambda some=some: _product(index, some),
            **({"faiss_flat": lambda some=some: flat.search(index.standardise(some), 10)[1]} if flat else {}),
        }
        times = {name: [] for name in searches}
        answers = {}
        for _ in range(repeats):
            for name, search in searches.items():
                started = clock()
                answers[name] = search()
                times[name].append(clock() - started)
        best = {name: min(each) for name, each in times.items()}
        found = {**best, "over_product": best["ours"] / best["product"]}
        if flat:
            pairs = zip(answers["ours"], answers["faiss_flat"], strict=True)
            found["over_faiss"] = best["ours"] / best["faiss_flat"]
            found["same"] = float(np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]))
        measured[f"{number}_queries"] = found
    return measured


def _flat(index: Index):
    flat = faiss.IndexFlatIP(index.store.dimensions)
    for start in range(0, len(index.vectors), 4096):
        flat.add(index.standardise(index.vectors[start : start + 4096]))
    return flat


def _product(index: Index, queries: np.ndarray) -> None:
    for start in range(0, len(index.vectors), 16384):
        queries @ index.vectors[start : start + 16384].T


def approximate(index: Index, queries: np.ndarray, repeats: int, clock: Callable[[], float]) -> dict:
    """Build seconds, file size, recall as told at the build, and seconds per query one by one."""
    started = clock()
    near, built = load_approximate(index)
    building, held = clock() - started, _held_gib()
    times = []
    for query in queries[: 20 * repeats]:
        started = clock()
        near.search(query[None], 10)
        times.append(clock() - started)
    size = (index.store.folder / "neighbours.faiss").stat().st_size
    return {
        **near.facts,
        "seconds_to_build": building if built else None,
        "held_gib": held,
        "most_ever_resident_gib": _status("VmHWM"),
        "median_seconds_per_query": float(np.median(times)),
        "file_gib": size / 2**30,
    }


def _held_gib() -> float:
    return _status("RssAnon")


def _status(name: str) -> float:
    """GiB by a line of Linux's account of this process."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


if __name__ == "__main__":
    main()
