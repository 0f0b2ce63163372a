"""Slices of volumes, their texts, and the embeddings of both."""
