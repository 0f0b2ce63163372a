"""Weights from whatever file they come in: recognised, renamed, described."""
