"""Segmentation: fine-tuning through nnU-Net, and its evaluation."""
