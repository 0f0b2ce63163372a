"""Self-supervised pretraining for nnU-Net v2, through nnU-Net's own commands."""

__version__ = "0.1.0"
