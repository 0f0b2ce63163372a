"""Giving weights away and taking them back: export, import, model card, stock nnU-Net."""
