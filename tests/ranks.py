"""Run a function on two ranks (gloo, CPU) and collect what each returns."""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
sys.path.append(str(Path(__file__).resolve().parent.parent))  # spawned processes import tests by their full name


def on_two_ranks(function, folder: Path, *arguments) -> list:
    """``function(rank, *arguments)`` in two spawned processes; its results, rank by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_enter, args=(function, str(folder), port, arguments), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _enter(rank: int, function, folder: str, port: int, arguments: tuple) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.save(function(rank, *arguments), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
