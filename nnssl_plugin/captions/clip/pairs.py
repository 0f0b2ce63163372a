"""Image and text encoders that belong together, from a local file, a local folder, an open_clip tag, or random.

They are frozen, unless ``clip_training`` trains them first; :func:`save_pair` writes what :func:`load_pair` reads.
open_clip is imported when a pair is made, not before. Only a tag reads the network. Pickles are read with
``torch.load(weights_only=True)``: a file that needs more is refused.
"""

import hashlib
import logging
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_plugin.data.triplets import RANDOM_PAIR
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, write_json

log = logging.getLogger(__name__)

WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

_LOCAL_REMEDY = f"Give the model's folder ({CONFIG_FILE}, weights and tokenizer files): --weights FOLDER"

# about 7 million parameters, most of them the text embedding; one core embeds some hundred slices a second
_SMALL_VISION = {"layers": 2, "width": 128, "head_width": 32, "image_size": 112, "patch_size": 16, "pool_type": "avg"}
_SMALL_TEXT = {"layers": 2, "width": 128, "heads": 4, "context_length": 77}
_EMBEDDING_SIZE = 512


@dataclass(frozen=True)
class ClipPair:
    """Two encoders in evaluation mode, without gradients, and what feeds them."""

    model: nn.Module
    tokenise: Callable[[list[str]], Tensor]
    transform: Callable  # PIL image → (3, H, W) tensor
    weights: str  # human-readable name and hash
    config: dict  # model_cfg and preprocess_cfg, as in open_clip_config.json

    @torch.no_grad()
    def embed(self, pictures: list[np.ndarray], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embed N pictures ((H, W, 3) uint8 each) and N texts: two (N, E) float32 arrays with rows of length 1."""
        from PIL import Image

        batch = torch.stack([self.transform(Image.fromarray(picture)) for picture in pictures])
        image = self.model.encode_image(batch.to(self._device), normalize=True)
        return image.float().cpu().numpy(), self.embed_texts(texts)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Embed N texts: (N, E) float32 with rows of length 1."""
        text = self.model.encode_text(self.tokenise(texts).to(self._device), normalize=True)
        return text.float().cpu().numpy()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_pair(*, weights: str | None = None, model: str | None = None) -> ClipPair:
    """Make a pair of encoders.

    Args:
        weights: a file (:data:`WEIGHT_ENDINGS`), a folder with open_clip_config.json and weights, or an open_clip tag
            such as ``laion2b_s34b_b79k`` (then the weights are downloaded); None gives the small random pair.
        model: open_clip's name of the architecture, for a file or a tag.

    Raises:
        UserError: there is no such model, file or tag, the file is unsafe or does not fit, or the download failed.
    """
    if weights is None:
        if model is not None:
            raise UserError(f"--model {model} without weights.", "Give them too: --weights FILE, FOLDER or TAG")
        log.warning(
            "No --weights given: slices and texts are embedded by small random encoders. Random projections only tell "
            "slices apart, they carry no medical meaning. Give --weights for encoders that have been trained."
        )
        return random_pair()
    if Path(weights).is_dir():
        return _folder_pair(Path(weights), model)
    if Path(weights).is_file():
        return _file_pair(Path(weights), model)
    return _tag_pair(weights, model)


def save_pair(pair: ClipPair, folder: Path) -> None:
    """Write a pair as a folder that :func:`load_pair` reads, and open_clip itself under the name ``local-dir:FOLDER``.

    Raises:
        UserError: see :func:`check_can_be_saved`.
    """
    from safetensors.torch import save_file

    check_can_be_saved(pair)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pair.model.state_dict().items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    if pair.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        pair.tokenise.save_pretrained(folder)
    write_json(folder / CONFIG_FILE, pair.config)


def check_can_be_saved(pair: ClipPair) -> None:
    """Refuse a pair that could not be loaded again without the network.

    Raises:
        UserError: its text encoder is described on the Hugging Face hub only.
    """
    _check_is_local(pair.config["model_cfg"]["text_cfg"], pair.weights)


def random_pair() -> ClipPair:
    """A small pair with random weights, the same to the last bit on every machine."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        network = open_clip.CLIP(_EMBEDDING_SIZE, vision_cfg=_SMALL_VISION, text_cfg=_SMALL_TEXT)
    _set_reproducible_weights(network)
    tokeniser = open_clip.SimpleTokenizer(context_length=_SMALL_TEXT["context_length"])
    config = {"embed_dim": _EMBEDDING_SIZE, "vision_cfg": dict(_SMALL_VISION), "text_cfg": dict(_SMALL_TEXT)}
    return _pair(network, tokeniser, RANDOM_PAIR, config, preprocessing={"size": _SMALL_VISION["image_size"]})


def _set_reproducible_weights(network: nn.Module) -> None:
    """Uniform weights that keep the variance, equal to the last bit on every machine: NumPy's bit stream is fixed and
    scaling in float64 is exact rounding, while PyTorch's normal numbers depend on the processor's vector unit."""
    rng = np.random.Generator(np.random.PCG64(20250))
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
                continue
            if parameter.ndim < 2 and "embedding" not in name:
                continue  # layer norms and the temperature are constants already
            values = (rng.random(tuple(parameter.shape)) * 2.0 - 1.0) * math.sqrt(3.0 / _fan_in(name, parameter))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _fan_in(name: str, parameter: Tensor) -> int:
    """How many numbers one output adds up: embeddings are looked up, projections are stored as (inputs, outputs)."""
    if "embedding" in name:
        return 1
    return parameter.shape[0] if name.endswith(("proj", "text_projection")) else parameter[0].numel()


def _folder_pair(folder: Path, model: str | None) -> ClipPair:
    import open_clip

    name = f"{open_clip.factory.LOCAL_DIR_PREFIX}{folder.absolute()}"
    if model is not None:
        raise UserError(f"--model {model} beside a folder: its {CONFIG_FILE} names the model.", "Leave --model out.")
    try:
        config = open_clip.get_model_config(name)
        text = config["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"A folder holds {CONFIG_FILE} and the weights. Or give the file: --weights FILE --model NAME"
        raise UserError(f"{folder} holds no usable {CONFIG_FILE}: {_one_line(error)}", remedy) from error
    _check_is_local(text, folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_ENDINGS:
            _check_is_data(path)
    return _create(name, folder.name, require_pretrained=True)


def _file_pair(path: Path, model: str | None) -> ClipPair:
    if path.suffix not in WEIGHT_ENDINGS:
        raise UserError(f"{path} is no weights file by its ending.", f"Known: {', '.join(WEIGHT_ENDINGS)}.")
    text = _known_config(model, owner=str(path))["text_cfg"]
    _check_is_local(text, path)
    if text.get("hf_tokenizer_name"):
        raise UserError(f"{model} takes its tokenizer from the network.", _LOCAL_REMEDY)
    _check_is_data(path)
    return _create(model, f"{model} {path.name}", pretrained=str(path.absolute()))


def _tag_pair(tag: str, model: str | None) -> ClipPair:
    import open_clip

    _known_config(model, owner=f"The tag {tag}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        known = f"Tags of {model}: {', '.join(tags[:6]) or 'none'}."
        raise UserError(f"--weights {tag} is neither a file, nor a folder, nor a tag of {model}.", known)
    log.info("Weights %s of %s are downloaded where open_clip's cache does not hold them.", tag, model)
    return _create(model, f"{model} {tag}", pretrained=tag)


def _create(name: str, title: str, **source) -> ClipPair:
    import open_clip
    from huggingface_hub.errors import HfHubHTTPError

    # open_clip asserts where shapes differ, and takes any file for a dictionary
    damaged = (AssertionError, AttributeError, KeyError, StopIteration, TypeError, ValueError, pickle.UnpicklingError)
    errors = (OSError, RuntimeError, ImportError, HfHubHTTPError, *damaged)
    try:
        network = open_clip.create_model(name, weights_only=True, **source)
        tokeniser = open_clip.get_tokenizer(name)
        config = open_clip.get_model_config(name)
    except errors as error:
        remedy = "Does --model fit the weights? For a tag, is the network reachable? Else give --weights FILE."
        raise UserError(f"The encoders {title} could not be loaded: {_one_line(error)}", remedy) from error
    return _pair(network, tokeniser, title, config, preprocessing=dict(network.visual.preprocess_cfg))


def _pair(network: nn.Module, tokeniser: Callable, title: str, model_cfg: dict, *, preprocessing: dict) -> ClipPair:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    # "longest" pads to a square; open_clip's default would crop the ends of a long slice away
    preprocessing = {**preprocessing, "resize_mode": "longest"}
    config = PreprocessCfg(**preprocessing)
    network = network.eval().requires_grad_(False)
    return ClipPair(
        model=network,
        tokenise=tokeniser,
        transform=image_transform_v2(config, is_train=False),
        weights=f"{title} sha256:{_network_sha256(network, repr(config))[:16]}",
        config={"model_cfg": model_cfg, "preprocess_cfg": preprocessing},
    )


def _network_sha256(network: nn.Module, preprocessing: str) -> str:
    digest = hashlib.sha256(preprocessing.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _known_config(model: str | None, *, owner: str) -> dict:
    import open_clip

    config = open_clip.get_model_config(model) if model and ":" not in model else None
    if config is None:
        problem = f"{model} is no model of open_clip" if model else f"{owner} does not say which model it belongs to"
        raise UserError(f"{problem}.", "Give open_clip's name of the architecture: --model ViT-B-32")
    return config


def _check_is_local(text_config: dict, source: Path | str) -> None:
    if text_config.get("hf_model_name"):
        raise UserError(
            f"{source}: its text encoder {text_config['hf_model_name']} is described on the Hugging Face hub only, "
            "and local weights must not read the network.",
            "Take a model whose text encoder is open_clip's own, for example --model ViT-B-32.",
        )


def _check_is_data(path: Path) -> None:
    """Refuse a file that would have to run code to be read."""
    from safetensors import SafetensorError, safe_open

    errors = (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, OSError, EOFError, SafetensorError)
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as stream:
                stream.keys()
        else:
            torch.load(path, map_location="cpu", weights_only=True)
    except errors as error:
        raise UserError(
            f"{path} is damaged or holds more than tensors, and is not read: {_one_line(error)}",
            "Give the weights as .safetensors, or as a plain state dict of tensors.",
        ) from error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
