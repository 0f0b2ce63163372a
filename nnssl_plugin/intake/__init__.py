"""Scans as a hospital has them, as nnU-Net raw datasets."""
