"""Intervals, tests and rank metrics."""
