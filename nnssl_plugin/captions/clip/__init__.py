"""Pairs of image and text encoders, and their fine-tuning on slices and texts."""
