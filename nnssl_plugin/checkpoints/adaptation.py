"""From (weights, network) to (state dict, report): which tensor of the network gets which values, and why.

The network's architecture equals that of the weights, tensor by tensor; a tensor of another shape starts fresh.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.checkpoints.report import LoadReport, Part, TensorRecord
from nnssl_plugin.errors import UserError

HEAD = ".seg_layers."
"""Part of the keys of segmentation layers; stock nnU-Net never loads them, as they belong to the target's classes."""
NOT_TRAINED = "not trained in pretraining"
MISSING = "not in the checkpoint"
MIN_COVERAGE = 0.8
"""Fraction of the encoder's parameters that must come from the checkpoint."""


def adapt_weights(
    source: Mapping[str, Tensor], target: nn.Module, *, trained: Sequence[str] | None
) -> tuple[dict[str, Tensor], LoadReport]:
    """The complete state dict of ``target`` with every tensor of ``source`` that was trained and fits.

    Neither argument is changed. Keys of ``target`` that share their memory (``encoder.*`` and ``decoder.encoder.*``)
    get one tensor; where ``source`` holds several values for it, the last key counts, as in ``load_state_dict``.

    Args:
        source: state dict of the pretrained network, without prefixes such as ``module.``.
        target: the network to be trained; its present values are the initialisation of what is not loaded.
        trained: prefixes of the keys that pretraining trained; ``None`` when all were. Other tensors, and the
            segmentation layers, stay fresh even where they would fit, and are reported as initialised.

    Raises:
        UserError: when ``source`` holds values that are not finite.
    """
    encoder = _encoder_prefixes(target)
    parameters = {id(p) for p in target.parameters()}
    state: dict[str, Tensor] = {}
    records = []
    for keys, tensor in _shared(target):
        match, reason = _match(source, keys, tensor, trained)
        values = tensor.detach() if match is None else source[match].detach()
        if match is not None and values.is_floating_point() and not torch.isfinite(values).all():
            raise UserError(f"The checkpoint's tensor {match} holds values that are not finite: its training diverged.",
                            "Use an earlier checkpoint of the same run.")
        value = values.to(device="cpu", dtype=tensor.dtype, copy=True).contiguous()
        state.update(dict.fromkeys(keys, value))
        records.append(TensorRecord(
            keys=keys, part=_part(keys, encoder), status="initialised" if match is None else "copied", reason=reason,
            shape=tuple(tensor.shape), parameters=tensor.numel() if id(tensor) in parameters else 0,
        ))
    order = target.state_dict().keys()
    unused = tuple(key for key in source if key not in order)
    return {key: state[key] for key in order}, LoadReport(tuple(records), unused)


def check_coverage(
    report: LoadReport, *, minimum: float = MIN_COVERAGE, differences: Mapping[str, str] | None = None, mend: str = ""
) -> None:
    """Refuse weights that leave most of the encoder fresh.

    Args:
        report: what :func:`adapt_weights` gave.
        minimum: smallest accepted fraction of the encoder's parameters, in [0, 1].
        differences: what :func:`architecture_differences` gave, where the checkpoint's network is known.
        mend: the command that writes a plan from the target's, to which the differing values are added.

    Raises:
        UserError: below ``minimum``; it names the likeliest cause, the first tensors, and the command that mends it.
    """
    coverage = report.coverage("encoder")
    if coverage >= minimum:
        return
    fresh = [record for record in report.initialised() if record.part == "encoder" and record.parameters]
    lines = [f"Only {coverage:.1%} of the encoder's parameters come from the checkpoint; {minimum:.0%} are needed."]
    lines.append(f"The architectures differ: {'; '.join(list(differences.values())[:3])}." if differences
                 else _likely_cause(fresh))
    lines += [f"  {record.keys[0]}: {record.reason}" for record in fresh[:2]]
    if differences and mend:
        remedy = (f"Write a plan with the checkpoint's architecture, then adapt to it with -p:\n  {mend} --set "
                  + " ".join(f"'{assignment}'" for assignment in differences))
    else:
        remedy = "Pretrain with this plan's architecture, or adapt to a plan of the checkpoint's with -p."
    raise UserError("\n".join(lines), remedy)


def architecture_differences(
    source: Mapping[str, Any] | None, target: Mapping[str, Any], configuration: str
) -> dict[str, str]:
    """Assignment that gives a plan the source's architecture → what differs, as a person would say it.

    Args:
        source: class and arguments of the checkpoint's network (``provenance.describe_network``); None is unknown.
        target: the same of the plan.
        configuration: the plan's configuration.
    """
    if source is None or source == target:
        return {}
    place = f"configurations.{configuration}.architecture"
    if source["class"] != target["class"]:
        return {
            f"{place}.network_class_name={source['class']}":
                f"{source['class'].rpartition('.')[2]} in pretraining, {target['class'].rpartition('.')[2]} here",
            f"{place}.arch_kwargs={_json(source['kwargs'])}": "with other arguments",
        }
    return {
        f"{place}.arch_kwargs.{name}={_json(value)}":
            f"{name} is {_json(value)} in pretraining, {_json(target['kwargs'].get(name))} here"
        for name, value in source["kwargs"].items()
        if value != target["kwargs"].get(name)
    }


def _shared(target: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of the state dict once, with all of its keys in order."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for key, tensor in target.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(key)
    return [(tuple(keys), tensor) for keys, tensor in groups.values()]


def _match(
    source: Mapping[str, Tensor], keys: tuple[str, ...], tensor: Tensor, trained: Sequence[str] | None
) -> tuple[str | None, str]:
    """The key of ``source`` whose values the tensor takes, or None and the reason."""
    if any(HEAD in key for key in keys):
        return None, "segmentation layer of the target's classes"
    if trained is not None and not any(key.startswith(prefix) for key in keys for prefix in trained):
        return None, NOT_TRAINED
    present = [key for key in keys if key in source]
    if not present:
        return None, MISSING
    shape = tuple(source[present[-1]].shape)
    if shape != tuple(tensor.shape):
        return None, f"shape {shape} in the checkpoint, {tuple(tensor.shape)} here"
    return present[-1], ""


def _encoder_prefixes(target: nn.Module) -> tuple[str, ...]:
    """Prefixes of the encoder's keys, from the network's own metadata where it has some."""
    named = [getattr(target, name, None) for name in ("key_to_encoder", "key_to_stem")]
    return tuple(f"{name}." for name in named if name) or ("encoder.",)


def _part(keys: tuple[str, ...], encoder: tuple[str, ...]) -> Part:
    if any(HEAD in key for key in keys):
        return "head"
    return "encoder" if any(key.startswith(encoder) for key in keys) else "decoder"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _likely_cause(fresh: Sequence[TensorRecord]) -> str:
    reasons = [record.reason for record in fresh]
    if all(reason == NOT_TRAINED for reason in reasons):
        return "Its pretraining did not train the encoder."
    if all(reason == MISSING for reason in reasons):
        return "The keys do not match: another kind of network, or a prefix such as 'module.' before its keys."
    return "The architectures differ."
