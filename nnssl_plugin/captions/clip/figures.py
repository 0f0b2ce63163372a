"""Two pictures of a fine-tuned pair: how the training went, and which texts held-out slices find."""

import textwrap
from pathlib import Path

import numpy as np

from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.statistics.ranking import TITLES, Retrieval

COLOURS = {"slice_to_text": "#0072B2", "text_to_slice": "#D55E00"}  # Okabe and Ito
CHANCE_STYLES = {"slice_to_text": "--", "text_to_slice": ":"}
ANSWERS = 3
LINE = 125
"""Characters in a line of a text."""


def draw_training(
    history: list[dict], best_epoch: int, chance: dict[str, Retrieval], path: Path, *, pairs_per_batch: tuple[int, int]
) -> None:
    """Losses and recall per epoch, with what guessing gives.

    Args:
        history: entries of ``clip_training.TrainingState``.
        best_epoch: the one that is kept.
        chance: by direction.
        path: the PNG to write.
        pairs_per_batch: in training and of the held-out ones; a loss is larger among more pairs.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [entry["epoch"] for entry in history]
    marker = "." if len(epochs) < 40 else ""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    losses, recalls = figure.subplots(1, 2)
    training, held_out = ([entry[name] for entry in history] for name in ("train_loss", "held_out_loss"))
    labels = [f"{name}, {n} pairs per batch" for name, n in zip(("training", "held out"), pairs_per_batch, strict=True)]
    losses.plot(epochs[1:], training[1:], marker=marker, c="black", label=labels[0])
    losses.plot(epochs, held_out, "--", marker=marker, c="#CC79A7", label=labels[1])
    losses.set_title("Contrastive loss (0 is a perfect match)")
    for direction, title in TITLES.items():
        values = [100 * entry[direction]["recall_at_1"] for entry in history]
        recalls.plot(epochs, values, marker=marker, c=COLOURS[direction], label=title)
        guess = 100 * chance[direction].recall_at_1
        style = CHANCE_STYLES[direction]
        recalls.axhline(guess, ls=style, c=COLOURS[direction], label=f"{title}, chance ({guess:.1f} %)")
    recalls.set_title(f"Held-out R@1, {chance['slice_to_text'].queries} slices")
    recalls.set_ylabel("first answer is right (%)")
    recalls.set_ylim(bottom=0)
    for axis in (losses, recalls):
        axis.axvline(best_epoch, ls="-.", lw=1, c="grey", label=f"kept: epoch {best_epoch}")
        axis.set_xlabel("epoch (0: before training)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", framealpha=0.6)
    _save(figure, path)


def draw_retrieval(pictures: np.ndarray, scores: np.ndarray, texts: list[str], path: Path) -> None:
    """Some held-out slices with their own text and the texts that they find, marked right or wrong.

    Args:
        pictures: (M, S, S, 3) uint8.
        scores: (M, N) of each picture with each of the texts.
        texts: N; the first M are the pictures' own.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.9 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 2, squeeze=False, width_ratios=(1, 3.6))
    for (left, right), picture, row, own in zip(axes, pictures, scores, texts, strict=False):
        left.imshow(picture)
        right.text(0, 0.88, _wrapped("own text:", own), va="center", fontsize=9, weight="bold")
        for place, answer in enumerate(_best_texts(row, texts), start=1):
            mark, colour = ("✓ right", "#0072B2") if answer == own else ("✗ wrong", "#404040")
            right.text(0, 0.88 - 0.25 * place, _wrapped(f"{place}. {mark}:", answer), va="center", fontsize=9, c=colour)
        for axis in (left, right):
            axis.axis("off")
    figure.suptitle("Held-out slices, their own texts, and the texts that the pair finds for them", fontsize=12)
    _save(figure, path)


def _best_texts(scores: np.ndarray, texts: list[str]) -> list[str]:
    """The best distinct texts."""
    ordered = dict.fromkeys(texts[position] for position in np.argsort(-scores, kind="stable"))
    return list(ordered)[:ANSWERS]


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(f"{head} {text}", LINE, max_lines=3, placeholder=" …").replace("$", r"\$")


def _save(figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
