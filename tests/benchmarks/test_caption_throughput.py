"""The benchmark of captioning: its rows are whole, and one request at a time takes what the server takes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
caption_throughput = __import__("caption_throughput")


@pytest.mark.slow
def test_every_slice_is_described():
    rows = caption_throughput.measure([1, 8], delay=0.1, cases=2, edge=16)
    assert [(row["concurrency"], row["texts"]) for row in rows] == [(1, 16), (8, 16)]
    assert rows[0]["seconds"] > 1.6  # sixteen answers of a tenth of a second, one after the other
