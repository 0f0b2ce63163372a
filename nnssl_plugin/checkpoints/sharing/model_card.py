"""The model card of shared weights, in the sections of Hugging Face's template, from what the provenance says.

Template: ``huggingface_hub/templates/modelcard_template.md``. Nothing is claimed that the checkpoint does not say, and
what it says is text: HTML, Markdown and control characters in it are escaped.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from nnssl_plugin.checkpoints.format.health import SUM
from nnssl_plugin.checkpoints.format.provenance import datasets_of, licence_of
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray
from nnssl_plugin.checkpoints.format.tensors import parameters_in
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.io.text import printable

LICENCES = {
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "gpl-3.0",
    "lgpl-3.0",
    "agpl-3.0",
}
"""Identifiers of the hub's list that weights usually have; another one is written as ``other`` with its name."""
NNUNET_BIBTEX = """@article{isensee2021nnunet,
  title   = {nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation},
  author  = {Isensee, Fabian and Jaeger, Paul F. and Kohl, Simon A. A. and Petersen, Jens and Maier-Hein, Klaus H.},
  journal = {Nature Methods},
  volume  = {18},
  pages   = {203--211},
  year    = {2021},
  doi     = {10.1038/s41592-020-01008-z}
}"""
USAGE = {
    "safetensors": """With `nnssl_plugin` installed:

```bash
nnssl_plugin import THIS_FOLDER -o pretrained.pth
nnssl_plugin adapt -d TARGET_ID -w pretrained.pth -n {method}
nnUNetv2_train TARGET_ID {configuration} 0 -p nnUNetPlans-{method} -tr PretrainedSegmentationTrainer
```

`TARGET_ID` is a labelled dataset that nnU-Net has planned and preprocessed. `adapt` reports what became of every
tensor. The optimiser's state is not part of this folder: the pretraining cannot be resumed from it.""",
    "nnunet": """```bash
nnUNetv2_train TARGET_ID {configuration} 0 -p PLANS -pretrained_weights pretrained_weights.pth
```

`PLANS` must describe the network of `plans.json` beside this card, with as many input channels.""",
    "nnssl": """```bash
nnUNetv2_preprocess_like_nnssl -d TARGET_ID -n {method} -pc checkpoint_final.pth -am like_pretrained
```

The files are those that nnssl's repositories have, for the fine-tuning commands of nnssl and of nnU-Net.""",
    "torchvision": """```python
import torch, torchvision

network = torchvision.models.resnet50(weights=None)
print(network.load_state_dict(torch.load("encoder.pth", weights_only=True), strict=False))  # misses fc alone
```

Images are normalised as `plans.json` says, not with ImageNet's means. A smaller ResNet than ResNet-50 is built with the
`blocks` and `width_per_group` of that plan.""",
    "timm": """```python
import timm, torch

network = timm.create_model("samvit_base_patch16", num_classes=0, neck_chans=None)  # neck_chans: that of plans.json
network.load_state_dict(torch.load("encoder.pth", weights_only=True))
```

Images are normalised as `plans.json` says, not with ImageNet's means.""",
}
"""Layout of the folder → how to get started with it."""
NEEDED = (
    "method",
    "network",
    "licence",
    "channels",
    "normalisation",
    "spacing_mm",
    "patch_size",
    "transpose_forward",
    "orientation",
    "reader",
    "plans_name",
    "configuration",
    "data",
    "training",
    "settings",
    "packages",
    "trained",
    "steps",
    "date",
    "citations",
)
"""Fields of a provenance that the card shows."""
MODALITIES = {"CT": "computed-tomography", "MR": "magnetic-resonance-imaging"}


class PaperLike(Protocol):
    """A paper, as ``nnssl_plugin.registry`` holds it."""

    title: str
    authors: tuple[str, ...]
    venue: str
    year: int | None


@dataclass(frozen=True)
class Results:
    """Means of one of nnU-Net's ``summary.json``, without its cases."""

    name: str
    dice: float
    iou: float | None
    per_label: dict[str, float]
    """Label → Dice."""


def model_card(
    provenance: Mapping[str, Any],
    *,
    layout: str,
    weights: Mapping[str, Tensor],
    sha256: str,
    results: Sequence[Results] = (),
    papers: Mapping[str, PaperLike] | None = None,
    health: Mapping[str, float] | None = None,
    arrays: Mapping[str, SpatialArray] | None = None,
) -> str:
    """The card as Markdown with YAML in front.

    Args:
        provenance: of the checkpoint (``provenance.describe_pretraining``).
        layout: key of :data:`USAGE`.
        weights: the network's state dict, for its size.
        sha256: hash of the weights (``provenance.weights_hash``).
        results: what :func:`read_results` gave.
        papers: method → its paper, for a full BibTeX entry.
        health: what :func:`~nnssl_plugin.checkpoints.format.health.health_of` gave.
        arrays: volumes that were learned beside the weights and are part of the folder.

    Raises:
        UserError: for a provenance that leaves out what a card says.
    """
    missing = [name for name in NEEDED if provenance.get(name) is None]
    if missing:
        raise UserError(
            f"The provenance does not state {', '.join(missing)}, which the model card says.",
            "Export the checkpoint that the pretraining wrote.",
        )
    paper = (papers or {}).get(provenance["method"])
    provenance = {**provenance, "licence": licence_of(provenance)}
    front, bibtex = _front_matter(provenance), _bibtex(provenance, paper)
    provenance = _escaped(provenance)
    method, network = provenance["method"], provenance["network"]["class"].rpartition(".")[2]
    sections = [
        f"# Model Card for {network} pretrained with {method}\n\n{_summary(provenance)}",
        _details(provenance, weights, paper, sha256, arrays or {}),
        _uses(),
        _limitations(provenance),
        "## How to Get Started with the Model\n\n"
        + USAGE[layout].format(method=_argument(method), configuration=_argument(provenance["configuration"])),
        _training(provenance),
        f"## Evaluation\n\n{_results_table(results)}{_health(health or {})}",
        f"## Citation\n\n**BibTeX:**\n\n```bibtex\n{bibtex}\n```\n\n"
        "**APA:**\n\n" + "\n".join(f"- {citation}" for citation in _citations(provenance)),
    ]
    body = "\n\n".join(sections)
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}\n"))


def read_results(text: str) -> Results:
    """The means of a ``summary.json`` of nnU-Net's, named by the folders that nnU-Net gave it.

    Args:
        text: ``FILE`` or ``NAME=FILE``.

    Raises:
        UserError: for a file that is not there or no summary.
    """
    name, separator, file = text.rpartition("=")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"There is no summary {path}.", "Name a summary.json that nnU-Net wrote.")
    content = read_json(path)
    try:
        mean = content["foreground_mean"]
        per_label = {label: float(values["Dice"]) for label, values in content["mean"].items()}
        return Results(
            name if separator else _name_of(path),
            float(mean["Dice"]),
            float(mean["IoU"]) if "IoU" in mean else None,
            per_label,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a summary of nnU-Net's ({type(error).__name__}: {error}).",
            "Name fold_X/validation/summary.json or the output of nnUNetv2_evaluate_folder.",
        ) from error


def _name_of(path: Path) -> str:
    """Dataset, trainer__plans__configuration and fold of the path; nothing else of it, which might be private."""
    parts = [part for part in path.resolve().parts if re.fullmatch(r"Dataset\d{3}_\w+|.+__.+__.+|fold_\w+", part)]
    return ", ".join(parts) or "summary"


def _escaped(value: Any) -> Any:
    """A copy in which every text is shown as it is by Markdown, on one line."""
    if isinstance(value, str):
        return _markdown(value)
    if isinstance(value, Mapping):
        return {_markdown(str(key)): _escaped(entry) for key, entry in value.items()}
    return [_escaped(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _markdown(text: str) -> str:
    text = html.escape(_line(text), quote=False)
    return re.sub(r"([\[\]|])", r"\\\1", text)


def _line(text: str) -> str:
    """Without control characters, line breaks and backticks, which would end a block of code."""
    return printable(" ".join(text.splitlines())).replace("`", "'")


def _argument(text: str) -> str:
    """As an argument in a shell's command."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "pretrained"


def _front_matter(provenance: Mapping[str, Any]) -> ModelCardData:
    licence = _line(provenance["licence"])
    known = licence.lower() in LICENCES
    modalities = {MODALITIES[c] for channel in provenance["channels"] for c in MODALITIES if channel.startswith(c)}
    method = _line(provenance["method"])
    named: dict[str, Any] = {} if known or licence == "not stated" else {"license_name": licence}
    return ModelCardData(
        license=licence.lower() if known else "unknown" if licence == "not stated" else "other",
        library_name="nnssl_plugin",
        pipeline_tag="image-feature-extraction",
        tags=["medical-imaging", "self-supervised-learning", "nnU-Net", method, *sorted(modalities)],
        **named,
    )


def _cases(datasets: Sequence[Mapping[str, Any]]) -> int | str:
    """Cases of all datasets together."""
    counts = [data.get("cases") for data in datasets]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else "an unstated number of"


def _dataset(data: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    channels = data.get("channels") or provenance["channels"]
    licence = f", licence {data['licence']}" if "licence" in data else ""
    return f"{data.get('dataset', 'A dataset')}: {_cases([data])} cases, channels {', '.join(channels)}{licence}."


def _summary(provenance: Mapping[str, Any]) -> str:
    cases = _cases(datasets_of(provenance))
    return (
        f"Weights for fine-tuning with nnU-Net v2, pretrained without labels on {cases} "
        f"case{'' if cases == 1 else 's'} ({', '.join(provenance['channels'])})."
    )


def _details(
    provenance: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    paper: PaperLike | None,
    sha256: str,
    arrays: Mapping[str, SpatialArray],
) -> str:
    kwargs = provenance["network"]["kwargs"]
    lines = [
        f"- **Model type:** `{provenance['network']['class']}`, {parameters_in(weights):,} parameters, "
        f"{provenance.get('network_channels', len(provenance['channels']))} input channel(s)",
        f"- **Method:** {provenance['method']}" + (f", {paper.title} ({', '.join(paper.authors)})" if paper else ""),
        f"- **License:** {provenance['licence']}",
        f"- **SHA-256 of the weights:** `{sha256}` (keys, shapes and values, whatever file they are in)",
    ]
    for field, relation in (("continued_from", "Finetuned from model"), ("teacher", "Distilled from model")):
        if origin := provenance.get(field):
            lines.append(
                f"- **{relation}:** {origin.get('method', origin.get('kind', 'not stated'))}, licence "
                f"{licence_of(origin) or 'not stated'}, weights `{origin.get('weights_sha256', 'not stated')}`"
            )
    lines += [
        f"- **Beside the weights:** {_markdown(name)} of {_markdown(array.said())}" for name, array in arrays.items()
    ]
    shape = [
        f"`{key}` {json.dumps(kwargs[key])}"
        for key in ("features_per_stage", "strides", "kernel_sizes")
        if key in kwargs
    ]
    return (
        "## Model Details\n\n### Model Description\n\n"
        + "\n".join(lines)
        + (f"\n- **Architecture:** {'; '.join(shape)}" if shape else "")
    )


def _uses() -> str:
    return (
        "## Uses\n\n### Direct Use\n\nInitial weights for fine-tuning, and features. The segmentation layers were "
        "not trained: the network does not segment anything as it is.\n\n### Out-of-Scope Use\n\nDiagnosis, "
        "treatment and any other clinical decision. Research software; not a medical device."
    )


def _limitations(provenance: Mapping[str, Any]) -> str:
    trained = ", ".join(f"`{prefix}`" for prefix in provenance["trained"])
    return (
        "## Bias, Risks, and Limitations\n\nPretraining trained the tensors whose keys begin with "
        f"{trained}; every other tensor is as it was initialised. The weights know images of the kind, resolution "
        "and intensities described below, from the scanners and patients of one collection; how they do on others "
        "has to be measured. Compare with training from scratch on the same folds."
    )


def _training(provenance: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in provenance["packages"].items() if number)
    sizes = " × ".join("?" if size is None else f"{size:g}" for size in provenance["spacing_mm"])
    patch = " × ".join(map(str, provenance["patch_size"]))
    settings = {**provenance["training"], **{f"method.{k}": v for k, v in provenance["settings"].items()}}
    rows = "\n".join(f"| `{name}` | {_cell(value)} |" for name, value in settings.items())
    data = " ".join(_dataset(each, provenance) for each in datasets_of(provenance))
    return (
        f"## Training Details\n\n### Training Data\n\n{data} The images, the names of the cases and their labels, if "
        "any, are not part of these files.\n\n### Training Procedure\n\n#### Preprocessing\n\n"
        f"nnU-Net's plan `{provenance['plans_name']}`, configuration `{provenance['configuration']}`: spacing {sizes} "
        f"mm and patches of {patch} voxels in the plan's axes (`transpose_forward` "
        f"{provenance['transpose_forward']}), normalisation {', '.join(provenance['normalisation'])} per channel, "
        f"orientation {provenance['orientation']} (reader {provenance['reader']}).\n\n"
        f"#### Training Hyperparameters\n\nOptimiser steps: {provenance['steps']:,}. Finished "
        f"{provenance['date'][:10]}, with {packages}.\n\n| setting | value |\n|---|---|\n{rows}"
    )


def _results_table(results: Sequence[Results]) -> str:
    if not results:
        return "No results were given with these weights."
    labels = list(dict.fromkeys(label for result in results for label in result.per_label))
    head = ["result", "mean Dice", "mean IoU", *(f"Dice of {label}" for label in labels)]
    lines = [head, ["---"] * len(head)]
    for result in results:
        numbers = [result.dice, result.iou, *(result.per_label.get(label) for label in labels)]
        lines.append([_markdown(result.name), *map(_number, numbers)])
    return "nnU-Net's means over the cases, after fine-tuning.\n\n" + "\n".join(
        f"| {' | '.join(line)} |" for line in lines
    )


def _health(health: Mapping[str, float]) -> str:
    """The end of the pretraining's log."""
    said = ", ".join(f"{name} {value:.0f}" if name == SUM else f"{name} {value:.4g}" for name, value in health.items())
    return f"\n\nAt the end of the pretraining: {said}." if said else ""


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _citations(provenance: Mapping[str, Any]) -> list[str]:
    """Those of the method, then those of the weights that it learned from or started from."""
    found, origins = [], [provenance]
    while origins:
        origin = origins.pop(0)
        stated = origin.get("citations") or []
        found += [text for text in ([stated] if isinstance(stated, str) else stated) if isinstance(text, str)]
        origins += [origin[field] for field in ("teacher", "continued_from") if origin.get(field)]
    return list(dict.fromkeys(found))


def _bibtex(provenance: Mapping[str, Any], paper: PaperLike | None) -> str:
    """An entry for the method (of its paper where it is known, else one per citation), and nnU-Net's."""
    method = re.sub(r"\W", "", provenance["method"], flags=re.ASCII)
    entries = [
        f"@misc{{{method}{'' if number == 0 else number + 1},\n  note = {{{_line(citation)}}}\n}}"
        for number, citation in enumerate(_citations(provenance))
    ]
    if paper is not None:
        fields = {
            "title": f"{{{paper.title}}}",
            "author": " and ".join(paper.authors),
            "howpublished": paper.venue,
            "year": paper.year or "",
        }
        rows = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
        entries = [f"@misc{{{method},\n{rows}\n}}", *entries[1:]]
    return "\n\n".join([*entries, NNUNET_BIBTEX])
