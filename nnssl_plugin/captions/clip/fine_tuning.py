"""From the slices and texts of a raw dataset to a fine-tuned pair beside them: the step before Med3DInsight."""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from nnssl_plugin.captions.clip.data import SliceTexts, epoch_batches, prepare_pairs, split_cases
from nnssl_plugin.captions.clip.figures import draw_retrieval, draw_training
from nnssl_plugin.captions.clip.pairs import (
    ClipPair,
    check_can_be_saved,
    load_pair,
    random_pair,
    save_pair,
)
from nnssl_plugin.captions.clip.training import FROM_SCRATCH, ClipSettings, TrainingState, embed_prepared, train_pair
from nnssl_plugin.data.triplets import PAIR_FOLDER, PAIR_RECORD
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.statistics.ranking import TITLES, Retrieval, as_plain, chance_of_retrieval

log = logging.getLogger(__name__)

TRAINING_FIGURE, RETRIEVAL_FIGURE = "clip_training.png", "clip_retrieval.png"
STATE_FILE = "clip_training_state.pt"
FEW_HELD_OUT = 20
SHOWN_SLICES = 4


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned pair; each retrieval is by direction, among the held-out pairs."""

    folder: Path  # for --weights
    was_there: bool  # same weights, pairs and settings as in an earlier run: nothing was trained
    pairs: int
    held_out: int
    epochs: int  # that were trained
    best_epoch: int  # that is kept; 0 is the pair as it was
    before: dict[str, Retrieval]
    after: dict[str, Retrieval]
    chance: dict[str, Retrieval]


def fine_tune_pair(
    raw_folder: Path, *, model: str | None = None, weights: str | None = None, device: str = "cpu", **changes
) -> FineTuned:
    """Fine-tune a pair of encoders on the triplets of a raw dataset and save it in ``clip_pair`` there.

    An interrupted run goes on after its last epoch, and a finished one is not repeated, as long as weights, settings,
    slices and texts are the same.

    Args:
        raw_folder: raw dataset with ``triplets.jsonl``.
        model: open_clip's name of the architecture, where ``weights`` needs one.
        weights: file, folder or tag (see ``clip_pairs.load_pair``); None trains a small pair from scratch.
        device: ``cpu`` or ``cuda``.
        changes: fields of :class:`ClipSettings` that differ from the defaults.

    Raises:
        UserError: fewer than 10 cases, weights that cannot be used, no such device, or a loss that is not finite.
    """
    _check_device(device)
    from_scratch = weights is None and model is None
    settings = replace(FROM_SCRATCH if from_scratch else ClipSettings(), **changes)
    pair = random_pair() if from_scratch else load_pair(weights=weights, model=model)
    check_can_be_saved(pair)
    pairs = prepare_pairs(raw_folder, pair)
    key = hashlib.sha256(json.dumps([asdict(settings), pair.weights, pairs.fingerprint()]).encode()).hexdigest()
    folder, state_path = raw_folder / PAIR_FOLDER, raw_folder / STATE_FILE
    record = _finished(folder, key)
    if record is not None:
        return _summary(folder, record, was_there=True)
    train, held_out = split_cases(pairs.cases, settings.holdout, seed=settings.seed)
    held_out_cases = len({pairs.cases[position] for position in held_out})
    _say_what_to_expect(pair, weights, len(train), len(held_out), held_out_cases)
    state = train_pair(pair, pairs, (train, held_out), settings, state_path=state_path, key=key, device=device)
    record = _record(pair, pairs, held_out, settings, state) | {"key": key}
    (folder / PAIR_RECORD).unlink(missing_ok=True)  # it vouches for the rest, and comes back last
    _draw(folder, pair, pairs, (train, held_out), settings, state)
    save_pair(pair, folder)
    write_json(folder / PAIR_RECORD, record)
    for path in (state_path, *raw_folder.glob(f".{STATE_FILE}.*")):  # and what a kill in mid-write left behind
        path.unlink(missing_ok=True)
    return _summary(folder, record, was_there=False)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here.", "Train on the processor: -device cpu")


def _say_what_to_expect(pair: ClipPair, weights: str | None, train: int, held_out: int, held_out_cases: int) -> None:
    if weights is None:
        log.warning(
            "No --weights given: a small pair is trained from scratch on %d slice–text pairs. It knows these pairs and "
            "nothing else; its embeddings carry no medical knowledge from outside. That serves to try the pipeline, "
            "or with thousands of pairs. Otherwise give --weights.",
            train,
        )
    if held_out_cases < FEW_HELD_OUT:
        few = "Only %d cases are held out: read their retrieval as a rough sign, or raise --holdout."
        log.warning(few, held_out_cases)
    log.info("Fine-tuning %s on %d pairs, %d held out.", pair.weights, train, held_out)


def _record(
    pair: ClipPair, pairs: SliceTexts, held_out: np.ndarray, settings: ClipSettings, state: TrainingState
) -> dict:
    texts = [pairs.texts[position] for position in held_out]
    measures = {"before": state.history[0], "after": state.history[state.best_epoch]}
    retrieval = {name: {direction: entry[direction] for direction in TITLES} for name, entry in measures.items()}
    return {
        "base_weights": pair.weights,
        "architecture": pair.config["model_cfg"],
        "preprocessing": pair.config["preprocess_cfg"],
        "settings": asdict(settings),
        "pairs": len(pairs.cases),
        "held_out": len(held_out),
        "held_out_cases": sorted({pairs.cases[position] for position in held_out}),
        "distinct_texts": len(set(pairs.texts)),
        "share_of_commonest_text": max(Counter(pairs.texts).values()) / len(pairs.texts),
        "best_epoch": state.best_epoch,
        "retrieval": {**retrieval, "chance": as_plain(chance_of_retrieval(texts))},
        "history": state.history,
        "packages": {name: version(name) for name in ("nnssl_plugin", "open_clip_torch", "torch", "torchvision")},
    }


def _draw(
    folder: Path,
    pair: ClipPair,
    pairs: SliceTexts,
    parts: tuple[np.ndarray, np.ndarray],
    settings: ClipSettings,
    state: TrainingState,
) -> None:
    """Both figures; the examples are the first held-out slices, so that nobody chooses them."""
    held_out = parts[1]
    texts = [pairs.texts[position] for position in held_out]
    sizes = [max(map(len, epoch_batches(part, settings.batch_size, seed=settings.seed, epoch=0))) for part in parts]
    chance = chance_of_retrieval(texts)
    draw_training(state.history, state.best_epoch, chance, folder / TRAINING_FIGURE, pairs_per_batch=tuple(sizes))
    image, text = embed_prepared(pair, pairs, held_out)
    scores = (image[:SHOWN_SLICES] @ text.T).cpu().numpy()
    pictures = pairs.images[held_out[:SHOWN_SLICES]].permute(0, 2, 3, 1).numpy()
    draw_retrieval(pictures, scores, texts, folder / RETRIEVAL_FIGURE)


def _finished(folder: Path, key: str) -> dict | None:
    """The record of an earlier run with the same key."""
    path = folder / PAIR_RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except UserError:
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def _summary(folder: Path, record: dict, *, was_there: bool) -> FineTuned:
    measured = {
        name: {direction: Retrieval(**entry) for direction, entry in by_direction.items()}
        for name, by_direction in record["retrieval"].items()
    }
    return FineTuned(
        folder=folder,
        was_there=was_there,
        pairs=record["pairs"],
        held_out=record.get("held_out", len(record["held_out_cases"])),  # absent where each case had one pair
        epochs=record["history"][-1]["epoch"],
        best_epoch=record["best_epoch"],
        **measured,
    )
