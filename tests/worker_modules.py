"""What a worker of a training has imported once it made a batch; this file, which it imports too, imports nothing."""

import os
import sys

HEAVY = ("nnunetv2.training.nnUNetTrainer", "nnunetv2.run", "torch._dynamo", "torch._inductor", "triton", "_pytest")
"""What no worker needs: trainers, torch's compiler, and the script that runs (of a test, pytest's)."""


class ImportedModules:
    """Batch *k* of other batches, what the worker has imported by then, and who it and its parent are."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, step):
        batch = self.batches[step]
        heavy = [name for name in sys.modules if name.startswith(HEAVY)]
        return {"step": step, "batch": batch, "heavy": heavy, "processes": {os.getpid(), os.getppid()}}
