"""How many slices per minute a server on loopback describes, by the number of requests at once.

    python benchmarks/caption_throughput.py
    python benchmarks/caption_throughput.py --delay 0.5 --concurrency 1 4 8 16 --cases 16 --output throughput.json

The server answers every request after a fixed delay, any number at once, so the table shows what the captioner adds:
reading volumes, drawing slices, PNG, HTTP, and a text on the disk before the next. Volumes: noise of 128³ voxels.
"""

import argparse
import json
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.captions.captioners import open_captioner
from nnssl_plugin.captions.triplets import caption_dataset
from nnssl_plugin.io.files import write_json

REPLY = {
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "A slice of noise."}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 100, "completion_tokens": 10},
}


def serve(delay: float) -> ThreadingHTTPServer:
    """A server that gives every request the same answer after ``delay`` seconds."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay)
            body = json.dumps(REPLY).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def make_dataset(folder: Path, cases: int, edge: int) -> Path:
    """A raw dataset of noise."""
    (folder / "imagesTr").mkdir(parents=True)
    for case in range(cases):
        noise = np.random.default_rng(case).normal(size=(edge,) * 3).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), folder / "imagesTr" / f"c{case:03d}_0000.nii.gz")
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", {**content, "numTraining": cases})
    return folder


def measure(concurrencies: list[int], *, delay: float, cases: int, edge: int = 128) -> list[dict[str, float]]:
    """A row per number of requests at once, on one dataset that is described anew each time."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        folder = make_dataset(Path(work) / "Dataset001_Noise", cases, edge)
        server = serve(delay)
        for concurrency in concurrencies:
            (folder / "triplets.jsonl").unlink(missing_ok=True)
            options = {"endpoint": f"http://127.0.0.1:{server.server_port}/v1", "model": "m"}
            captioner = open_captioner("openai", {**options, "concurrency": concurrency})
            started = time.perf_counter()
            texts = caption_dataset(folder, captioner).added
            seconds = time.perf_counter() - started
            rows.append({"concurrency": concurrency, "texts": texts, "seconds": seconds, "per_s": texts / seconds})
        server.shutdown()
        server.server_close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--delay", type=float, default=1.0, help="seconds per answer (default: 1)")
    parser.add_argument("--cases", type=int, default=12, help="of eight slices each (default: 12)")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    rows = measure(args.concurrency, delay=args.delay, cases=args.cases)
    print("at once   texts   seconds   texts/s   times the first")
    for row in rows:
        times = row["per_s"] / rows[0]["per_s"]
        print(f"{row['concurrency']:7d} {row['texts']:7d} {row['seconds']:9.1f} {row['per_s']:9.2f} {times:17.2f}")
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    main()
