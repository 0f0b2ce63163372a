"""Probing of frozen features: separation of tokens by label."""
