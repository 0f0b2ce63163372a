"""Which weights a number comes from: those of the last epoch, or those that did best on the validation cases."""

FINAL, BEST = "final", "best"
FILES = {FINAL: "checkpoint_final.pth", BEST: "checkpoint_best.pth"}
VALIDATION = {FINAL: "validation", BEST: "validation_best"}
"""Folder of a fold's validation by each of them."""
TOO_GOOD = "best epoch, chosen on validation cases: on these the numbers are too good"
"""What every table and figure says of the best epoch: labels drawn at random reach an AUROC of 0.6 there."""


def checkpoint_file(name: str) -> str:
    """File of ``final`` or ``best``; any other name is a file already."""
    return FILES.get(name, name)


def checkpoint_name(file: str) -> str:
    """``final`` or ``best`` of a file; other files keep their name."""
    return next((name for name, of_name in FILES.items() if of_name == file), file)
