"""The report: one HTML file that holds its pictures, needs no network and no script, and prints."""

import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnssl_plugin.data.triplets import by_case, read_triplets
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.planes import stored_axis
from nnssl_plugin.quickstart import pages, pictures
from nnssl_plugin.quickstart.pages import code, figure, paragraph, section, table
from nnssl_plugin.quickstart.results import ALL_LABELS, Scores, difference, read_history, read_scores, spread
from nnssl_plugin.quickstart.state import Journal
from nnssl_plugin.quickstart.steps import ARMS, PRETRAINING, SETTINGS, TARGET, fold_folder

REPORT = "report.html"
PICTURES = "report"
CAPTIONS_SHOWN = 4
HONEST = (
    "This shows that the road works. It does not show what pretraining brings: that needs a large pretraining set, "
    "a full-sized network, full schedules, several seeds and many test cases. The interval covers the choice of the "
    "test cases, not the luck of one training."
)


def write_report(folder: Path, journal: Journal) -> Path:
    """Draw the pictures into ``report/`` and write ``report.html`` from what the folder holds.

    Args:
        folder: a quickstart's folder whose steps are done.
        journal: what was done, in which time, and which scans were used.

    Returns:
        the HTML file.
    """
    drawn = folder / PICTURES
    drawn.mkdir(exist_ok=True)
    selection = journal.selection
    scores = read_scores(folder, selection) if selection.test else None
    sections = [_summary(journal, scores)]
    if scores is not None:
        sections += [_dice(scores, drawn), _contours(folder, journal, scores, drawn)]
    sections += [
        _curves(folder, drawn, labelled=scores is not None),
        _reconstructions(folder, drawn),
        _captions(folder, drawn),
        _times(journal, drawn),
        _for_real(journal),
        _commands(folder, journal),
    ]
    with atomic_path(folder / REPORT) as temporary:
        temporary.write_text(pages.page("nnssl_plugin quickstart", sections, _footer()), encoding="utf-8")
    return folder / REPORT


def _summary(journal: Journal, scores: Scores | None) -> str:
    setting, selection = journal.setting, journal.selection
    source = "generated phantoms" if setting.images is None else f"scans from {setting.images}"
    done = (
        f"A small 3D network was pretrained on {len(selection.pretraining)} {source}, without labels "
        f"({SETTINGS['epochs']} epochs of {SETTINGS['iterations_per_epoch']} steps, Med3DInsight)"
    )
    if scores is None:
        return section("What was done", paragraph(done + "."), _notes(selection.notes))
    epochs, steps = SETTINGS["finetuning.epochs"], SETTINGS["finetuning.iterations_per_epoch"]
    done += (
        f", then fine-tuned on {len(selection.training)} labelled cases, once from the pretrained weights and "
        f"once from random ones ({epochs} epochs of {steps} steps each), and tested on {len(selection.test)} "
        "cases that neither had seen."
    )
    spreads = {arm: spread(scores.of(arm, ALL_LABELS)) for arm in ARMS}
    gap = difference(scores, ALL_LABELS)
    result = (
        f"Mean Dice on the test cases: {_number(spreads['pretrained'].mean)} from pretrained weights, "
        f"{_number(spreads['scratch'].mean)} from scratch; difference {_signed(gap.mean)} "
        f"(95 % interval over {gap.pairs} cases {_signed(gap.low)} to {_signed(gap.high)})."
    )
    return section(
        "What was done, and what came out",
        paragraph(done),
        paragraph(result, kind="result"),
        paragraph(HONEST, kind="honest"),
        _notes(selection.notes),
    )


def _notes(notes: Sequence[str]) -> str:
    return pages.bullets("What was cut or guessed", notes) if notes else ""


def _dice(scores: Scores, drawn: Path) -> str:
    rows = []
    for name in (*scores.labels, ALL_LABELS):
        cells = [text for arm in ARMS for text in _spread_cells(spread(scores.of(arm, name)))]
        gap = difference(scores, name)
        rows.append([name, *cells, _signed(gap.mean), f"{_signed(gap.low)} to {_signed(gap.high)}"])
    columns = [f"{arm}: {what}" for arm in ARMS for what in ("mean", "SD", "min–max")]
    overall = table(
        f"Dice on {len(scores.cases)} test cases, per label; difference: pretrained minus scratch, paired "
        "by case, 95 % bootstrap interval",
        ["label", *columns, "difference", "interval"],
        rows,
    )
    names = (*scores.labels, ALL_LABELS)
    each = table(
        "Dice of each test case",
        ["case", *(f"{arm}: {name}" for arm in ARMS for name in names)],
        [
            [case, *(_number(scores.of(arm, name)[i]) for arm in ARMS for name in names)]
            for i, case in enumerate(scores.cases)
        ],
    )
    pictures.draw_dice(scores, drawn / "dice.png")
    alt = "Dice of each test case, pretrained beside scratch, joined by a line per case; the numbers are in the table."
    shown = figure(drawn / "dice.png", alt, "Each line is one test case.")
    return section("Dice of both arms", overall, shown, pages.folded("Every test case", each))


def _contours(folder: Path, journal: Journal, scores: Scores, drawn: Path) -> str:
    raw, labels, shown = folder / "nnUNet_raw" / TARGET, journal.selection.labels, []
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
        alt = f"{case}, {plane}: true contours (solid) and predicted ones (dashed) of both arms. Mean Dice: {dice}."
        shown.append(figure(path, alt, f"{case}. Mean Dice: {dice}."))
    intro = "Each test case on its slice with the most labels. Solid: true contour, dashed: predicted."
    return section("Predicted against true contours", paragraph(intro), pages.side_by_side(shown))


def _curves(folder: Path, drawn: Path, *, labelled: bool) -> str:
    history = read_history(folder)
    pictures.draw_pretraining(history, drawn / "pretraining.png")
    first, last = (_number(history["train_losses"][i]) for i in (0, -1))
    shown = [
        figure(
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
            figure(
                drawn / "finetuning.png",
                f"Curves of the fine-tuning of both arms: loss and pseudo Dice. Pseudo Dice at the end: {ends}.",
                "Fine-tuning of both arms on the same schedule.",
            )
        )
    return section("Loss curves", *shown)


def _reconstructions(folder: Path, drawn: Path) -> str:
    made = sorted((fold_folder(folder) / "figures").glob("reconstruction_epoch_*.png"))
    shown = []
    for source in dict.fromkeys([made[0], made[-1]] if made else []):
        path = drawn / source.name
        shutil.copyfile(source, path)
        epoch = int(source.stem.rpartition("_")[2]) + 1
        alt = f"Slices of a scan after epoch {epoch}: as it is, with blocks hidden, and as the network restores it."
        shown.append(figure(path, alt, f"After epoch {epoch}."))
    intro = "Part of the pretraining is to restore what was hidden. Rows: the central slice along each axis."
    return section("Reconstructions", paragraph(intro), pages.side_by_side(shown)) if shown else ""


def _captions(folder: Path, drawn: Path) -> str:
    raw = folder / "nnUNet_raw" / PRETRAINING
    triplets = [slices[0] for slices in by_case(read_triplets(raw)).values()][:CAPTIONS_SHOWN]
    slices = []
    for number, triplet in enumerate(triplets, 1):
        image = raw / "imagesTr" / f"{triplet.case}_0000.nii.gz"
        axis, _ = stored_axis(pictures.affine_of(image), triplet.plane)
        slices.append((f"{number}: {triplet.plane}", image, axis, triplet.slice))
    pictures.draw_captions(slices, drawn / "captions.png")
    shown = figure(drawn / "captions.png", "The slices that the texts of the table describe, in its order.", "")
    rows = [[str(number), t.case, t.text] for number, t in enumerate(triplets, 1)]
    intro = "The other part is to match each scan with a slice of it and a text. A better captioner gives better texts."
    return section("Slices and captions", paragraph(intro), shown, table("The texts", ["", "case", "text"], rows))


def _times(journal: Journal, drawn: Path) -> str:
    seconds = journal.seconds
    pictures.draw_times(seconds, drawn / "times.png")
    total, longest = sum(seconds.values()), max(seconds, key=seconds.get)
    alt = f"Seconds per step: {', '.join(f'{title} {value:.0f}' for title, value in seconds.items())}."
    text = (
        f"{total / 60:.1f} minutes in all, most of it in {longest} ({seconds[longest]:.0f} s). Each command takes "
        "seconds to import PyTorch and nnU-Net, which long trainings do not notice."
    )
    return section("Where the time went", paragraph(text), figure(drawn / "times.png", alt, ""))


def _for_real(journal: Journal) -> str:
    setting, modality = journal.setting, journal.selection.modality
    lines = f"""export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...   # nnU-Net's three folders
eval "$(nnssl_plugin env)"                                         # lets nnU-Net find the trainers

# all your unlabelled scans → dataset 501 → pretraining with the network that nnU-Net plans
nnssl_plugin prepare -i {shlex.quote(setting.images or "YOUR_SCANS")} -d 501 -n Unlabelled --modality {modality}
nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres
nnssl_plugin caption -d 501
nnUNetv2_train 501 3d_fullres all -tr Med3DInsightPretrainer

# your labelled nnU-Net dataset, here 7, under the same plan
nnUNetv2_plan_and_preprocess -d 7 --no_pp
nnUNetv2_move_plans_between_datasets -s 501 -t 7 -sp nnUNetPlans -tp nnUNetPlansFrom501
nnUNetv2_preprocess -d 7 -plans_name nnUNetPlansFrom501 -c 3d_fullres

# fine-tuning, and its twin from scratch; folds 0 to 4
CHECKPOINT=$nnUNet_results/Dataset501_Unlabelled/Med3DInsightPretrainer__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth
nnssl_plugin adapt -d 7 -w $CHECKPOINT -p nnUNetPlansFrom501 -n med3d
nnssl_plugin adapt -d 7 --from-scratch -p nnUNetPlansFrom501 -n scratch
nnUNetv2_train 7 3d_fullres 0 -tr PretrainedSegmentationTrainer -p nnUNetPlansFrom501-med3d
nnUNetv2_train 7 3d_fullres 0 -tr PretrainedSegmentationTrainer -p nnUNetPlansFrom501-scratch
nnUNetv2_predict -d 7 -c 3d_fullres -f 0 -tr PretrainedSegmentationTrainer -p nnUNetPlansFrom501-med3d -i IN -o OUT"""
    return section("For real", paragraph("The same road at full size, on a GPU:"), code(lines))


def _commands(folder: Path, journal: Journal) -> str:
    lines = [
        f"export {name}={shlex.quote(str(folder / name))}"
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    ]
    lines += ['eval "$(nnssl_plugin env)"']
    for title, command in journal.commands.items():
        lines += ["", f"# {title}", command]
    text = f"The full output of each lies in {folder / 'logs'}."
    return section("", pages.folded("All commands that were run", code("\n".join(lines)), paragraph(text)))


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
