"""Probing: what frozen features tell apart."""
