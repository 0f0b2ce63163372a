"""``nnUNetv2_train`` with one torch thread, for trainings side by side on a CPU; arguments are nnU-Net's."""

import torch
from nnunetv2.run.run_training import run_training_entry

if __name__ == "__main__":
    # nnU-Net gives torch every core on a CPU, and runs that share the cores then wait for one another
    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None
    run_training_entry()
