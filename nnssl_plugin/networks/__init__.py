"""Families of planned networks, the interface to their features, and teachers."""
