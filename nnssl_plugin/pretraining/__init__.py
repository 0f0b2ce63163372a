"""Pretraining: the contract of a method and the trainer under every method."""
