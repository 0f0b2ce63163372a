"""Search in an index of clustered vectors beside FAISS: exact and approximate, time per query, memory, recall.

    OMP_NUM_THREADS=1 python benchmarks/retrieval_search.py WORK_FOLDER --rows 100000 --dimensions 1536

The index is generated: cluster centres on a sphere, vectors around them. FAISS's flat index holds the same standardised
vectors, in memory; ours reads the file, mapped into memory and read once before the clock starts. Runs of both take
turns, and the best of each counts. With one thread times are those of the process, so that other work on the machine
counts less; with several (OMP_NUM_THREADS and OPENBLAS_NUM_THREADS), of the clock.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from nnssl_plugin.data.vector_store import writing
from nnssl_plugin.tasks.retrieval.approximate import load_approximate
from nnssl_plugin.tasks.retrieval.index import Index, load_index
from nnssl_plugin.tasks.retrieval.standardisation import statistics_of

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
    threads = faiss.omp_get_max_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    found = {"rows": args.rows, "dimensions": args.dimensions, "threads": threads}
    parts = {"exact": exact} if args.without_approximate else {"exact": exact, "approximate": approximate}
    for name, part in parts.items():
        found[name] = part(index, queries, args.repeats, clock)
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
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
    """Seconds per search of ten neighbours, ours and FAISS's, and whether both found the same."""
    flat = faiss.IndexFlatIP(index.store.dimensions)
    for start in range(0, len(index.vectors), 4096):
        flat.add(index.standardise(index.vectors[start : start + 4096]))
    _ = index.lengths
    measured = {}
    for number in QUERIES:
        some = queries[:number]
        times = {"ours": [], "faiss_flat": []}
        for _ in range(repeats):
            started = clock()
            ours = index.search(some, 10)
            times["ours"].append(clock() - started)
            started = clock()
            theirs = flat.search(index.standardise(some), 10)
            times["faiss_flat"].append(clock() - started)
        best = {name: min(each) for name, each in times.items()}
        same = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ours.rows, theirs[1], strict=True)]))
        measured[f"{number}_queries"] = {**best, "ratio": best["ours"] / best["faiss_flat"], "same": same}
    return measured


def approximate(index: Index, queries: np.ndarray, repeats: int, clock: Callable[[], float]) -> dict:
    """Build seconds, file size, recall as told at the build, and seconds per query one by one."""
    started = clock()
    near, built = load_approximate(index)
    building = clock() - started
    times = []
    for query in queries[: 20 * repeats]:
        started = clock()
        near.search(query[None], 10)
        times.append(clock() - started)
    size = (index.store.folder / "neighbours.faiss").stat().st_size
    return {
        **near.facts,
        "seconds_to_build": building if built else None,
        "median_seconds_per_query": float(np.median(times)),
        "file_gib": size / 2**30,
    }


if __name__ == "__main__":
    main()
