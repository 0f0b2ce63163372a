"""What a file with weights is, in one screen; nothing is built, and no code of the file runs."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from nnssl_plugin.checkpoints.format.health import health_of
from nnssl_plugin.checkpoints.format.provenance import as_architecture, datasets_of, weights_hash
from nnssl_plugin.checkpoints.format.tensors import not_finite, parameters_in
from nnssl_plugin.checkpoints.sources.source import NNSSL, NNUNET, OWN, Source, read_source
from nnssl_plugin.checkpoints.sources.stems import said, stems_of
from nnssl_plugin.io.text import printable, some
from nnssl_plugin.nnunet.network_classes import unknown_names

UNSTATED = "not stated"
NOTHING = (None, "", [], {})
WIDTH = 118
"""Columns of the screen."""
LABEL = 15
"""Columns of the names on the left."""
MOST_LINES = 2
"""Lines that one entry of the screen may take."""
MOST_CITATIONS = 3
SAID_OF_HEALTH = {
    "feature_std": "feature spread (1 is healthy, 0 collapsed)",
    "effective_rank": "effective rank",
    "train_losses": "training loss",
    "val_losses": "validation loss",
    "ema_fg_dice": "foreground Dice (moving average)",
}
"""Series of nnU-Net's log → how the screen calls their last number."""
SAID = {
    OWN: "a checkpoint of nnssl_plugin",
    NNUNET: "a checkpoint of nnU-Net (supervised training)",
    NNSSL: "a pretraining checkpoint of MIC-DKFZ/nnssl",
    "plain": "a file of PyTorch with a state dict",
    "safetensors": "a safetensors file",
}
SHOWN_ARGUMENTS = (
    "features_per_stage",
    "strides",
    "n_blocks_per_stage",
    "n_conv_per_stage",
    "embed_dim",
    "eva_depth",
    "eva_numheads",
    "patch_embed_size",
    "input_shape",
    "feature_size",
    "depths",
    "num_heads",
)
"""Arguments of a network that say what it is."""


def inspect_file(path: str | Path, *, mapping: str | Path | None = None, trust: bool = False) -> dict[str, Any]:
    """Everything that a file with weights says about itself, in plain types.

    Args:
        path: whatever :func:`~nnssl_plugin.checkpoints.sources.source.read_source` reads.
        mapping: a table for the keys of foreign weights.
        trust: the commands that it names build the network whatever its class.

    Returns:
        the fields of the JSON report; None where the file is silent.

    Raises:
        UserError: for a file that cannot be read without running code, and what ``read_source`` raises.
    """
    path = Path(path)
    source = read_source(path, mapping=mapping)
    known = source.provenance
    report = {
        "file": str(path),
        "bytes": _size(path),
        "kind": source.kind,
        "what": _what(source),
        "taken": list(known.get("taken", [])),
        "method": known.get("method"),
        "date": known.get("date"),
        "network": source.network,
        "unknown_classes": _unknown_classes(source),
        "parameters": parameters_in(source.weights),
        "tensors": len(source.weights),
        "first_keys": list(source.weights)[:3],
        "trained": None if source.trained is None else list(source.trained),
        "input_channels": source.input_channels,
        "stems": stems_of(source.weights),
        **{
            name: known.get(name)
            for name in (
                "channels",
                "network_channels",
                "normalisation",
                "spacing_mm",
                "native_spacing",
                "orientation",
                "transpose_forward",
                "data",
                "steps",
                "licence",
                "packages",
            )
        },
        "patch_size": source.patch_size,
        "plans_name": known.get("plans_name") or (source.plans or {}).get("plans_name"),
        "configuration": source.configuration or known.get("configuration"),
        "epochs": _epochs(source.content),
        "health": _health(source, path),
        "not_finite": not_finite(source.weights),
        "citations": _citations(known.get("citations") or source.content.get("citations") or []),
        "hash": _hash(source),
        "arrays": {name: array.said() for name, array in source.arrays.items()},
        "use": _use(source, path, mapping, trust=trust),
    }
    return json.loads(json.dumps(report, default=str))


def screen(report: Mapping[str, Any]) -> str:
    """The report as at most 40 lines of text; "not stated" where the file is silent."""
    size = f"{report['bytes'] / 2**20:,.1f} MiB"
    lines = [f"{report['file']} ({size})", f"  {report['what']}", ""]
    if report["unknown_classes"]:
        lines += [
            f"CAUTION: its network names {some(report['unknown_classes'])}, which this package does not know.",
            "  plan and classify run that only with --trust.",
            "",
        ]
    for label, value in _entries(report):
        lines += _entry(label, value)
    lines += ["", "use it with:"]
    lines += [f"  {command}" for command in report["use"]]
    return printable("\n".join(lines))


def _entries(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("method", _text(report["method"])),
        ("written", _text(report["date"])),
        ("network", _network(report)),
        ("weights", f"{report['parameters']:,} parameters in {report['tensors']} tensors"),
        ("trained", _trained(report["trained"])),
        ("input", _stated(report, "{} channels", "input_channels", _meaning(report), "channels")),
        *([("stems", f"one of: {', '.join(said(report['stems']))}")] if report["stems"] else []),
        ("normalisation", _text(report["normalisation"])),
        ("geometry", _geometry(report)),
        *[("array", f"{name} of {said}") for name, said in report["arrays"].items()],
        ("orientation", _stated(report, "{}", "orientation", "transposed by {}", "transpose_forward")),
        ("trained on", _trained_on(report)),
        ("trained for", _stated(report, "{} steps", "steps", "{} epochs", "epochs")),
        ("plan", _stated(report, "{}", "plans_name", "{}", "configuration")),
        ("health", _healthy(report["health"], report["not_finite"])),
        ("licence", _text(report["licence"])),
        ("cite", _cited(report["citations"])),
        ("hash", report["hash"]),
        *([("read as", "; ".join(report["taken"]))] if report["taken"] else []),
        *([("first keys", ", ".join(report["first_keys"]))] if report["network"] is None else []),
    ]


def _stated(values: Mapping[str, Any], first: str, one: str, second: str, other: str) -> str:
    """Two values in their sentences; one that the file does not state is named, or both at once."""
    if all(values.get(name) in NOTHING for name in (one, other)):
        return UNSTATED
    said = [
        sentence.format(_text(values.get(name)))
        if values.get(name) not in NOTHING
        else f"{name.replace('_', ' ')} {UNSTATED}"
        for sentence, name in ((first, one), (second, other))
    ]
    return ", ".join(said)


def _trained_on(report: Mapping[str, Any]) -> str:
    said = [_stated(data, "{}", "dataset", "{} cases", "cases") for data in datasets_of(report)]
    return "; ".join(said) or UNSTATED


def _meaning(report: Mapping[str, Any]) -> str:
    """How the channels of the network and of its dataset go together."""
    apart = report["network_channels"] not in (None, len(report["channels"] or ()))
    return f"in pretraining {report['network_channels']}, made of {{}}" if apart else "meaning {}"


def _geometry(report: Mapping[str, Any]) -> str:
    if not report["native_spacing"]:
        return _stated(report, "spacing {} mm", "spacing_mm", "patch {} voxels", "patch_size")
    return f"every case at its own spacing (not resampled), patch {_text(report['patch_size'])} voxels"


def _entry(label: str, value: str) -> list[str]:
    wrapped = textwrap.wrap(value, WIDTH - LABEL, break_on_hyphens=False) or [UNSTATED]
    if len(wrapped) > MOST_LINES:
        last = textwrap.shorten(" ".join(wrapped[MOST_LINES - 1 :]), WIDTH - LABEL, placeholder=" …")
        wrapped = [*wrapped[: MOST_LINES - 1], last]
    return [f"{name:<{LABEL}}{line}" for name, line in zip([label, *[""] * len(wrapped)], wrapped, strict=False)]


def _what(source: Source) -> str:
    if "adaptation" in source.content:
        return "weights that nnssl_plugin adapt wrote for fine-tuning"
    trainer = source.content.get("trainer_name")
    kind = "a folder of shared weights" if source.path.is_dir() else SAID[source.kind]
    return kind + (f", written by {trainer}" if trainer else "")


def _network(report: Mapping[str, Any]) -> str:
    network = report["network"]
    if network is None:
        return UNSTATED
    arguments = [f"{name} {_compact(network['kwargs'][name])}" for name in SHOWN_ARGUMENTS if name in network["kwargs"]]
    name = network["class"].rpartition(".")[2]
    return f"{name}: {', '.join(arguments)}" if arguments else name


def _trained(prefixes: Sequence[str] | None) -> str:
    if prefixes is None:
        return "everything, as far as the file says"
    if len(prefixes) > 10:
        return f"{len(prefixes)} tensors came from the pretraining; the rest is fresh"
    return f"{', '.join(prefixes) or 'nothing'}; the rest is as it was initialised"


def _healthy(health: Mapping[str, float], not_finite: Sequence[str]) -> str:
    said = [f"NaN OR INFINITE VALUES in {len(not_finite)} tensors: {some(not_finite)}"] if not_finite else []
    said += [f"{text} {health[name]:.4g}" for name, text in SAID_OF_HEALTH.items() if name in health]
    if "skipped_steps" in health:
        said.append(f"skipped steps {health['skipped_steps']:.0f}")
    return ", ".join(said) or UNSTATED


def _health(source: Source, path: Path) -> dict[str, float]:
    """What the log says, or an exported file of it; weights that ``adapt`` wrote speak of another training."""
    return {} if "adaptation" in source.content else health_of(source.content, path)


def _epochs(content: Mapping[str, Any]) -> int | None:
    epochs = content.get("current_epoch", content.get("epoch"))
    return int(epochs) if isinstance(epochs, Real) and abs(epochs) < 2**63 else None


def _unknown_classes(source: Source) -> list[str]:
    """Names in the network's description that are no network, layer or initialiser that is known."""
    return [] if source.network is None else unknown_names(as_architecture(source.network))


def _citations(stated: Any) -> list[str]:
    """Citations as texts; nnssl and nnU-Net keep them in groups, each with its ``apa_citations``."""
    if isinstance(stated, str):
        return [stated]
    texts: list[str] = []
    for entry in stated:
        texts += [str(text) for text in entry.get("apa_citations", [])] if isinstance(entry, Mapping) else [str(entry)]
    return texts


def _cited(citations: Sequence[str]) -> str:
    more = f" (and {len(citations) - MOST_CITATIONS} more)" if len(citations) > MOST_CITATIONS else ""
    return "; ".join(citations[:MOST_CITATIONS]) + more if citations else UNSTATED


def _hash(source: Source) -> str:
    recorded = source.provenance.get("weights_sha256")
    if not recorded or "adaptation" in source.content:
        return UNSTATED
    if weights_hash(source.weights) == recorded:
        return f"the weights are those that the file describes (sha256 {recorded[:12]}…)"
    return "THE WEIGHTS ARE NOT THOSE THAT THE FILE DESCRIBES: they were changed after the training"


def _use(source: Source, path: Path, mapping: str | Path | None, *, trust: bool) -> list[str]:
    """Commands that take the file, as they are typed."""
    if "adaptation" in source.content:
        plan = (source.plans or {}).get("plans_name", "PLANS")
        configuration = source.configuration or "3d_fullres"
        return [
            f"nnUNetv2_train TARGET_ID {configuration} 0 -p {plan} -tr PretrainedSegmentationTrainer",
            f"nnUNetv2_train TARGET_ID {configuration} 0 -p {plan} -pretrained_weights {path}",
        ]
    flags = (f" --mapping {mapping}" if mapping else "") + (" --trust" if trust else "")
    several = len(stems_of(source.weights)) > 1
    flags += " --stem ID" if several else ""
    commands = [f"nnssl_plugin adapt -d TARGET_ID -w {path} -n {_name(source)}{flags}"]
    if source.network is None and not mapping:
        commands.append(f"{commands[0]} --mapping TABLE   (where its keys are not those of the plan's network)")
    if source.kind == NNUNET and not several:
        commands.append(
            f"nnUNetv2_train TARGET_ID {source.configuration} 0 -pretrained_weights {path}"
            "   (where the plans describe the same network)"
        )
    return commands


def _name(source: Source) -> str:
    """A name for the fine-tuning plan, from the method."""
    method = str(source.provenance.get("method") or "pretrained").partition(",")[0]
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", method).strip("-.").lower() or "pretrained"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _text(value: Any) -> str:
    if value in NOTHING:
        return UNSTATED
    return ", ".join(str(entry) for entry in value) if isinstance(value, (list, tuple)) else str(value)


def _once(sizes: Any) -> Any:
    """The size of all axes, where they are equal."""
    equal = isinstance(sizes, (list, tuple)) and sizes and all(size == sizes[0] for size in sizes)
    return sizes[0] if equal else sizes


def _compact(value: Any) -> str:
    """Arguments per stage without spaces, equal axes once: ``[[2, 2, 2]]`` is ``[2]``."""
    if isinstance(value, (list, tuple)):
        return json.dumps([_once(entry) for entry in value], separators=(",", ":"))
    return str(value)
