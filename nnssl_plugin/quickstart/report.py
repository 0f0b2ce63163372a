"""Writes the report: one HTML file that holds its pictures, needs no network and no script, and prints."""

import base64
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nnssl_plugin.data.triplets import by_case, read_triplets
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.planes import stored_axis
from nnssl_plugin.quickstart import pictures
from nnssl_plugin.quickstart.results import ALL_LABELS, Scores, difference, read_history, read_scores, spread
from nnssl_plugin.quickstart.state import State
from nnssl_plugin.quickstart.steps import ARMS, PRETRAINING, SETTINGS, TARGET, fold_folder

REPORT = "report.html"
PICTURES = "report"
CAPTIONS_SHOWN = 4


@dataclass(frozen=True)
class Picture:
    """A PNG of the page."""

    path: Path
    alt: str
    """What it shows, for those who cannot see it."""
    caption: str = ""

    @property
    def base64(self) -> str:
        """The file as it stands in a data URL."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Table:
    """A table whose first row and first column are headers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(folder: Path, state: State) -> Path:
    """Draw the pictures into ``report/`` and write ``report.html`` from what the folder holds.

    Args:
        folder: a quickstart's folder whose steps are done.
        state: what was done, in which time, and which scans were used.

    Returns:
        the HTML file.
    """
    drawn = folder / PICTURES
    drawn.mkdir(exist_ok=True)
    selection = state.selection
    scores = read_scores(folder, selection) if selection.test else None
    content = {
        "done": _done(state),
        "result": None if scores is None else _result(scores),
        "notes": selection.notes,  # which name no files: the report is to be sent
        "dice": None if scores is None else _dice(scores, drawn),
        "contours": [] if scores is None else _contours(folder, state, scores, drawn),
        "curves": _curves(folder, drawn, labelled=scores is not None),
        "reconstructions": _reconstructions(folder, drawn),
        "captions": _captions(folder, drawn),
        "times": _times(state, drawn),
        "modality": selection.modality,
        "commands": _commands(folder, state),
        "footer": _footer(),
    }
    templates = Environment(
        loader=PackageLoader("nnssl_plugin.quickstart"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with atomic_path(folder / REPORT) as temporary:
        temporary.write_text(templates.get_template(REPORT).render(content), encoding="utf-8")
    return folder / REPORT


def _done(state: State) -> str:
    selection = state.selection
    source = "generated phantoms" if state.setting.images is None else "scans"
    done = (
        f"A small 3D network was pretrained on {len(selection.pretraining)} {source}, without labels "
        f"({SETTINGS['epochs']} epochs of {SETTINGS['iterations_per_epoch']} steps, Med3DInsight)"
    )
    if not selection.test:
        return done + "."
    epochs, steps = SETTINGS["finetuning.epochs"], SETTINGS["finetuning.iterations_per_epoch"]
    return (
        f"{done}, then fine-tuned on {len(selection.training)} labelled cases, once from the pretrained weights and "
        f"once from random ones ({epochs} epochs of {steps} steps each), and tested on {len(selection.test)} "
        "cases that neither had seen."
    )


def _result(scores: Scores) -> str:
    spreads = {arm: spread(scores.of(arm, ALL_LABELS)) for arm in ARMS}
    gap = difference(scores, ALL_LABELS)
    return (
        f"Mean Dice on the test cases: {_number(spreads['pretrained'].mean)} from pretrained weights, "
        f"{_number(spreads['scratch'].mean)} from scratch; difference {_signed(gap.mean)} "
        f"(95 % interval over {gap.pairs} cases {_signed(gap.low)} to {_signed(gap.high)})."
    )


def _dice(scores: Scores, drawn: Path) -> dict[str, Any]:
    names, rows = (*scores.labels, ALL_LABELS), []
    for name in names:
        cells = [text for arm in ARMS for text in _spread_cells(spread(scores.of(arm, name)))]
        gap = difference(scores, name)
        rows.append([name, *cells, _signed(gap.mean), f"{_signed(gap.low)} to {_signed(gap.high)}"])
    columns = [f"{arm}: {what}" for arm in ARMS for what in ("mean", "SD", "min–max")]
    overall = Table(
        f"Dice on {len(scores.cases)} test cases, per label; difference: pretrained minus scratch, paired "
        "by case, 95 % bootstrap interval",
        ["label", *columns, "difference", "interval"],
        rows,
    )
    each = Table(
        "Dice of each test case",
        ["case", *(f"{arm}: {name}" for arm in ARMS for name in names)],
        [
            [f"case {i + 1}", *(_number(scores.of(arm, name)[i]) for arm in ARMS for name in names)]
            for i in range(len(scores.cases))
        ],
    )
    pictures.draw_dice(scores, drawn / "dice.png")
    alt = "Dice of each test case, pretrained beside scratch, joined by a line per case; the numbers are in the table."
    return {
        "overall": overall,
        "each": each,
        "picture": Picture(drawn / "dice.png", alt, "Each line is one test case."),
    }


def _contours(folder: Path, state: State, scores: Scores, drawn: Path) -> list[Picture]:
    raw, labels, shown = folder / "nnUNet_raw" / TARGET, state.selection.labels, []
    for i, case in enumerate(scores.cases):
        path = drawn / f"contours_{i + 1:02d}.png"
        predictions = {arm: folder / "predictions" / arm / f"{case}.nii.gz" for arm in ARMS}
        plane = pictures.draw_contours(
            raw / "imagesTs" / f"{case}_0000.nii.gz",
            raw / "labelsTs" / f"{case}.nii.gz",
            predictions,
            path,
            labels=labels,
        )
        dice = ", ".join(f"{arm} {_number(scores.of(arm, ALL_LABELS)[i])}" for arm in ARMS)
        alt = (
            f"Case {i + 1}, {plane}: true contours (solid) and predicted ones (dashed) of both arms. Mean Dice: {dice}."
        )
        shown.append(Picture(path, alt, f"Case {i + 1}. Mean Dice: {dice}."))
    return shown


def _curves(folder: Path, drawn: Path, *, labelled: bool) -> list[Picture]:
    history = read_history(folder)
    pictures.draw_pretraining(history, drawn / "pretraining.png")
    first, last = (_number(history["train_losses"][i]) for i in (0, -1))
    shown = [
        Picture(
            drawn / "pretraining.png",
            f"Curves of the pretraining: its loss goes from {first} to {last} in "
            f"{len(history['train_losses'])} epochs; beside it, the terms of the loss.",
            "Pretraining.",
        )
    ]
    if labelled:
        histories = {arm: read_history(folder, arm) for arm in ARMS}
        pictures.draw_finetuning(histories, drawn / "finetuning.png")
        ends = ", ".join(f"{arm} {_number(h['mean_fg_dice'][-1])}" for arm, h in histories.items())
        shown.append(
            Picture(
                drawn / "finetuning.png",
                f"Curves of the fine-tuning of both arms: loss and pseudo Dice. Pseudo Dice at the end: {ends}.",
                "Fine-tuning of both arms on the same schedule.",
            )
        )
    return shown


def _reconstructions(folder: Path, drawn: Path) -> list[Picture]:
    made = sorted((fold_folder(folder) / "figures").glob("reconstruction_epoch_*.png"))
    shown = []
    for source in dict.fromkeys([made[0], made[-1]] if made else []):
        path = drawn / source.name
        shutil.copyfile(source, path)
        epoch = int(source.stem.rpartition("_")[2])
        alt = f"Slices of a scan in epoch {epoch}: as it is, with blocks hidden, and as the network restores it."
        shown.append(Picture(path, alt, f"Epoch {epoch}."))
    return shown


def _captions(folder: Path, drawn: Path) -> dict[str, Any]:
    raw = folder / "nnUNet_raw" / PRETRAINING
    triplets = [slices[0] for slices in by_case(read_triplets(raw)).values()][:CAPTIONS_SHOWN]
    slices = []
    for number, triplet in enumerate(triplets, 1):
        image = raw / "imagesTr" / f"{triplet.case}_0000.nii.gz"
        axis, _ = stored_axis(pictures.affine_of(image), triplet.plane)
        slices.append((f"{number}: {triplet.plane}", image, axis, triplet.slice))
    pictures.draw_captions(slices, drawn / "captions.png")
    return {
        "picture": Picture(drawn / "captions.png", "The slices that the texts of the table describe, in its order."),
        "texts": Table("The texts", ["slice", "text"], [[str(number), t.text] for number, t in enumerate(triplets, 1)]),
    }


def _times(state: State, drawn: Path) -> dict[str, Any]:
    seconds = state.seconds
    pictures.draw_times(seconds, drawn / "times.png")
    total, longest = sum(seconds.values()), max(seconds, key=seconds.get)
    alt = f"Seconds per step: {', '.join(f'{title} {value:.0f}' for title, value in seconds.items())}."
    text = (
        f"{total / 60:.1f} minutes in all, most of it in {longest} ({seconds[longest]:.0f} s). Each command takes "
        "seconds to import PyTorch and nnU-Net, which long trainings do not notice."
    )
    return {"text": text, "picture": Picture(drawn / "times.png", alt)}


def _commands(folder: Path, state: State) -> str:
    """The commands as they were run, with placeholders for the folders, which are nobody else's business."""
    lines = [f"export {name}=QUICKSTART/{name}" for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    lines += ['eval "$(nnssl_plugin env)"']
    for title, command in state.commands.items():
        lines += ["", f"# {title}", _without_paths(command, folder, state)]
    return "\n".join(lines)


def _without_paths(command: str, folder: Path, state: State) -> str:
    places = {str(folder): "QUICKSTART", state.setting.images: "YOUR_SCANS", state.setting.labels: "YOUR_LABELS"}
    for path in sorted(filter(None, places), key=len, reverse=True):
        for written in (shlex.quote(path), path):
            command = command.replace(written, places[path])
    return command


def _footer() -> str:
    packages = ", ".join(f"{name} {_version(name)}" for name in ("nnssl_plugin", "nnunetv2", "torch"))
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')} · {packages} · Python {platform.python_version()} · "
        f"{os.cpu_count()} CPU cores. Research software; not a medical device."
    )


def _spread_cells(s) -> list[str]:
    return [_number(s.mean), _number(s.sd), f"{_number(s.low)}–{_number(s.high)}"]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"
