"""Is everything in order, and what will nnU-Net find? Nothing here imports torch or nnU-Net: they may be broken."""
