"""What every figure shares: a backend without a window, one palette, and files that are never half written."""

from pathlib import Path

from nnssl_plugin.io.files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def save_figure(figure, path: str | Path, *, dpi: int = 80) -> None:
    """Write a figure and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    pyplot().close(figure)


def pyplot():
    """matplotlib's pyplot on a backend that needs no display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
