"""Runs the whole pipeline in minutes, on generated phantoms or a few of the user's scans, and writes a report."""
