"""Training a pair of encoders on slice–text pairs with CLIP's loss, stopped and resumed at any epoch.

Med3DInsight fine-tunes CLIP on its slice–text pairs before the pretraining (section IV-A) and gives no numbers for it;
where it is silent, the defaults are those of CLIP (Radford et al. 2021, tables 18 and 20).
"""

import logging
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nnssl_plugin.captions.clip.data import SliceTexts, epoch_batches, scaled
from nnssl_plugin.captions.clip.pairs import ClipPair
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.statistics.ranking import SLICE_TO_TEXT, TEXT_TO_SLICE, as_plain, measure_retrieval

log = logging.getLogger(__name__)

LARGEST_SCALE = math.log(100)
"""Of the logarithm of the inverse temperature (CLIP, section 2.5); the smallest is 0."""

EMBEDDED_AT_ONCE = 64


@dataclass(frozen=True)
class ClipSettings:
    """How a pair is trained; the defaults suit weights that have been trained before."""

    lr: float = 1e-5  # largest learning rate; CLIP's own 5e-4 would undo what pretrained weights know
    epochs: int = 30
    batch_size: int = 64  # largest; the batches of an epoch are nearly equal
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then a cosine to 0
    weight_decay: float = 0.2  # CLIP, table 18; not on gains, biases and the temperature
    beta1: float = 0.9  # CLIP, table 18
    beta2: float = 0.98  # CLIP, table 18, for vision transformers
    epsilon: float = 1e-6  # CLIP, table 18, for vision transformers
    patience: int = 10  # epochs without a lower held-out loss after which the training stops
    holdout: float = 0.1  # share of the cases that are held out
    seed: int = 0  # draws held-out cases and the order of the pairs

    def __post_init__(self):
        """Raises UserError for a value out of its range."""
        wrong = [
            f"{name} {getattr(self, name)}"
            for name, fits in (
                ("lr", 0 < self.lr < math.inf),
                ("epochs", self.epochs >= 1),
                ("batch_size", self.batch_size >= 2),
                ("warmup", 0 <= self.warmup < 1),
                ("patience", self.patience >= 1),
                ("holdout", 0 < self.holdout <= 0.5),
                ("seed", self.seed >= 0),
            )
            if not fits
        ]
        if wrong:
            remedy = "lr > 0, epochs and patience ≥ 1, batch size ≥ 2, holdout in (0, 0.5], seed ≥ 0."
            raise UserError(f"No training with {', '.join(wrong)}.", remedy)


FROM_SCRATCH = ClipSettings(lr=5e-4, epochs=100)
"""For random weights: CLIP's learning rate (table 20, ViT-B/32)."""


@dataclass
class TrainingState:
    """What a resumed training needs beside the settings; ``best`` holds the weights of the best epoch."""

    history: list[dict]  # one entry per epoch, 0 is before training
    best_epoch: int
    best: dict[str, Tensor]

    @property
    def epoch(self) -> int:
        """The last epoch that is done."""
        return self.history[-1]["epoch"]


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, same_text: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3), where equal texts are answers to each other.

    Captions repeat, and a slice that has the same text is no wrong answer: the target of a row is uniform over the
    pairs of equal text. The entropy of the targets is taken off, so that 0 is a perfect match. Where all texts differ
    this is CLIP's loss.

    Args:
        image: (B, E), rows of length 1.
        text: (B, E), rows of length 1.
        scale: () inverse temperature.
        same_text: (B,) equal numbers where the texts are equal.
    """
    same = (same_text[:, None] == same_text[None, :]).to(image.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    logits = scale * image @ text.T
    cross_entropy = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    return cross_entropy - same.sum(dim=1).log().mean()


def train_pair(
    pair: ClipPair,
    pairs: SliceTexts,
    parts: tuple[np.ndarray, np.ndarray],
    settings: ClipSettings,
    *,
    state_path: Path,
    key: str,
    device: str = "cpu",
) -> TrainingState:
    """Train a pair in place and leave it with the weights of the epoch whose held-out loss was lowest.

    Epoch 0, before any training, takes part: encoders that fine-tuning does not improve stay as they were.

    Args:
        pair: the encoders.
        pairs: what they learn from.
        parts: positions of the training pairs and of the held-out ones.
        settings: how.
        state_path: file that is written after every epoch; an interrupted training goes on from it.
        key: of the weights, pairs and settings; a state of another key is not used.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: the loss is not finite.
    """
    train, held_out = parts
    model = pair.model.to(device).requires_grad_(True)
    optimiser = _optimiser(model, settings)
    state = _resume(state_path, key, model, optimiser)
    if state is None:
        history = [{"epoch": 0, "train_loss": None, **_held_out_measures(pair, pairs, held_out, settings)}]
        state = TrainingState(history=history, best_epoch=0, best=_copy(model))
        log.info(_line(history[0]))
    steps = len(epoch_batches(train, settings.batch_size, seed=settings.seed, epoch=1))
    bar = tqdm(total=settings.epochs * steps, initial=state.epoch * steps, desc="fine-tune", unit="step")
    with bar, logging_redirect_tqdm():
        while not _is_over(state, settings):
            epoch = state.epoch + 1
            train_loss = _train_epoch(pair, pairs, train, settings, optimiser, epoch=epoch, bar=bar)
            measures = _held_out_measures(pair, pairs, held_out, settings)
            _check_is_finite(train_loss, measures["held_out_loss"], epoch)
            state.history.append({"epoch": epoch, "train_loss": train_loss, **measures})
            if measures["held_out_loss"] < state.history[state.best_epoch]["held_out_loss"]:
                state.best_epoch, state.best = epoch, _copy(model)
            _save(state_path, key, model, optimiser, state)
            log.info(_line(state.history[-1]))
    model.load_state_dict(state.best)
    model.eval().requires_grad_(False)
    return state


@torch.no_grad()
def embed_prepared(pair: ClipPair, pairs: SliceTexts, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Embeddings of some pairs, two (N, E) float32 tensors with rows of length 1, on the device of the model."""
    pieces = np.array_split(positions, math.ceil(len(positions) / EMBEDDED_AT_ONCE))
    image, text = zip(*(_encode(pair, pairs, piece) for piece in pieces), strict=True)
    return torch.cat(image), torch.cat(text)


def _train_epoch(
    pair: ClipPair,
    pairs: SliceTexts,
    train: np.ndarray,
    settings: ClipSettings,
    optimiser: torch.optim.Optimizer,
    *,
    epoch: int,
    bar: tqdm,
) -> float:
    """One pass over the training pairs; the mean loss over them."""
    model = pair.model.train()
    device = next(model.parameters()).device
    batches = epoch_batches(train, settings.batch_size, seed=settings.seed, epoch=epoch)
    total = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng([settings.seed, epoch, 1]).integers(2**63)))  # encoders may drop
        for number, batch in enumerate(batches):
            step = (epoch - 1) * len(batches) + number
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * schedule(step, settings.epochs * len(batches), warmup=settings.warmup)
            image, text = _encode(pair, pairs, batch)
            loss = clip_loss(image, text, model.logit_scale.exp(), pairs.same_text[batch].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, LARGEST_SCALE)
            total += loss.item() * len(batch)
            bar.update()
    return total / len(train)


def schedule(step: int, steps: int, *, warmup: float) -> float:
    """Factor of the learning rate at a step counted from 0: a linear rise, then a cosine to 0 at ``steps``."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (math.floor(rising) + 1)
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def _held_out_measures(pair: ClipPair, pairs: SliceTexts, held_out: np.ndarray, settings: ClipSettings) -> dict:
    """Loss over batches as large as in training, and retrieval among all held-out pairs."""
    pair.model.eval()
    image, text = embed_prepared(pair, pairs, held_out)
    scale = pair.model.logit_scale.detach().exp()
    same_text = pairs.same_text[held_out].to(image.device)
    pieces = epoch_batches(np.arange(len(held_out)), settings.batch_size, seed=settings.seed, epoch=0)
    losses = [clip_loss(image[piece], text[piece], scale, same_text[piece]).item() * len(piece) for piece in pieces]
    texts = [pairs.texts[position] for position in held_out]
    retrieval = as_plain(measure_retrieval(image.cpu().numpy(), text.cpu().numpy(), texts))
    return {"held_out_loss": sum(losses) / len(held_out), **retrieval}


def _encode(pair: ClipPair, pairs: SliceTexts, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    device = next(pair.model.parameters()).device
    images = scaled(pairs.images[positions].to(device), pair)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_bfloat16(device)):
        image = pair.model.encode_image(images)
        text = pair.model.encode_text(pairs.tokens[positions].to(device))
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _optimiser(model: nn.Module, settings: ClipSettings) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


def _is_over(state: TrainingState, settings: ClipSettings) -> bool:
    return state.epoch >= settings.epochs or state.epoch - state.best_epoch >= settings.patience


def _check_is_finite(train_loss: float, held_out_loss: float, epoch: int) -> None:
    if not (math.isfinite(train_loss) and math.isfinite(held_out_loss)):
        problem = f"The loss of epoch {epoch} is not finite ({train_loss}, held out {held_out_loss})."
        raise UserError(problem, "Give a lower learning rate, for example --lr 1e-6, or a larger --batch-size.")


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _save(path: Path, key: str, model: nn.Module, optimiser: torch.optim.Optimizer, state: TrainingState) -> None:
    content = {"key": key, "model": model.state_dict(), "optimiser": optimiser.state_dict(), **vars(state)}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def _resume(path: Path, key: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> TrainingState | None:
    """Restore model and optimiser from a state of the same key; None where there is none."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        log.warning("%s cannot be read and is not used: %s", path, type(error).__name__)
        return None
    if content["key"] != key:
        log.warning("%s belongs to other weights, settings, slices or texts: training starts afresh.", path)
        return None
    model.load_state_dict(content["model"])
    optimiser.load_state_dict(content["optimiser"])
    log.info("Going on after epoch %d.", content["history"][-1]["epoch"])
    return TrainingState(content["history"], content["best_epoch"], content["best"])


def _line(entry: dict) -> str:
    train = "before training" if entry["train_loss"] is None else f"loss {entry['train_loss']:.3f}"
    recalls = f"{entry[SLICE_TO_TEXT]['recall_at_1']:.0%} and {entry[TEXT_TO_SLICE]['recall_at_1']:.0%}"
    return f"epoch {entry['epoch']}: {train}, held-out loss {entry['held_out_loss']:.3f}, R@1 {recalls}"
