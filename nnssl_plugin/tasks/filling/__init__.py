"""Filling in modalities that a case lacks, in the input folders of nnU-Net's prediction."""
