"""From (weights, network) to (state dict, report): which tensor of the network gets which values, and why.

The rules by which a tensor takes another shape are in ``rules.py``, with what each preserves; which tensors belong
together, where stages and blocks differ in number, is in ``blocks.py``.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.checkpoints.adaptation.correspondence import MISSING, Correspondence, Layout, prefix_tokens
from nnssl_plugin.checkpoints.adaptation.fitting import Fitted, Wishes, fit
from nnssl_plugin.checkpoints.adaptation.report import LoadReport, TensorRecord
from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import family_of_keys

HEAD = "segmentation layer of the target's classes"
NOT_TRAINED = "not trained in pretraining"
MIN_COVERAGE = 0.8
"""Fraction of the encoder's parameters that must come from the checkpoint."""


def adapt_weights(
    source: Mapping[str, Tensor],
    target: nn.Module,
    *,
    trained: Sequence[str] | None,
    inflate: bool = False,
    resize_width: bool = False,
    source_grid: Sequence[int] | None = None,
    target_grid: Sequence[int] | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The complete state dict of ``target`` with every tensor of ``source`` that was trained and can be made to fit.

    Neither argument is changed. The state dict is on the CPU; it shares memory with ``source`` where nothing had to
    be adapted, and with ``target`` where nothing was loaded: load it, or copy it, before either is trained on. Keys of
    ``target`` that share their memory (``encoder.*`` and ``decoder.encoder.*``) get one tensor; where ``source``
    holds several values for it, the last key counts, as in ``load_state_dict``. Weights of another family of networks
    are not loaded at all.

    Args:
        source: state dict of the pretrained network, without prefixes such as ``module.``.
        target: the network to be trained; its present values are the initialisation of what is not loaded.
        trained: prefixes of the keys that pretraining trained; ``None`` when all were. Other tensors, and the
            segmentation layers, stay fresh even where they would fit, and are reported as initialised.
        inflate: also adapt 2D kernels to a 3D network, and 3D ones to a 2D network.
        resize_width: also adapt layers of other widths, by their first channels; never in a transformer.
        source_grid: tokens per axis of the checkpoint's positional embedding (patch in voxels divided by the size of
            an embedded patch); ``None`` when not known.
        target_grid: the same of ``target``; ``None`` asks its rotary embedding.

    Raises:
        UserError: when ``source`` holds values that are not finite, or a positional embedding whose grid must be known
            and is not.
    """
    layout, tensors, order = Layout(target), _shared(target), list(target.state_dict())
    wishes = _wishes(
        source,
        target,
        layout,
        inflate=inflate,
        resize_width=resize_width,
        source_grid=source_grid,
        target_grid=target_grid,
    )
    adapter = _Adapter(source, order, layout, trained, wishes)
    parameters = {id(p) for p in target.parameters()}
    state: dict[str, Tensor] = {}
    records = []
    for keys, tensor in tensors:
        fresh = tensor.detach().cpu()
        match, fitted = adapter.take(keys, fresh)
        state.update(dict.fromkeys(keys, fresh if fitted.value is None else fitted.value.contiguous()))
        learned = id(tensor) in parameters
        records.append(
            TensorRecord(
                keys=keys,
                part=layout.part(keys),
                reason=fitted.reason,
                shape=tuple(tensor.shape),
                source=match,
                status="initialised" if fitted.value is None else "adapted" if fitted.reason else "copied",
                parameters=tensor.numel() if learned else 0,
                loaded=fitted.taken if learned else 0,
            )
        )
    return {key: state[key] for key in order}, LoadReport(tuple(records), adapter.unused(tensors))


class _Adapter:
    """What a checkpoint has for each tensor of a network."""

    def __init__(
        self,
        source: Mapping[str, Tensor],
        order: Sequence[str],
        layout: Layout,
        trained: Sequence[str] | None,
        wishes: Wishes,
    ):
        self.source, self.layout, self.trained, self.wishes = source, layout, trained, wishes
        self.correspondence = Correspondence(source, order)
        before, now = family_of_keys(source), family_of_keys(order)
        differ = before and now and before != now
        self.stranger = f"the checkpoint holds a {before.name}, this network is a {now.name}" if differ else ""

    def take(self, keys: tuple[str, ...], fresh: Tensor) -> tuple[str | None, Fitted]:
        """The key of the checkpoint whose values ``fresh`` (on the CPU) takes, or None, and what became of it."""
        match, reason = self._match(keys)
        if match is None:
            return None, Fitted(None, reason)
        values = self.source[match].detach()
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise UserError(
                f"The checkpoint's tensor {match} holds values that are not finite: its training diverged.",
                "Use an earlier checkpoint of the same run.",
            )
        fitted = fit(values.to(device="cpu", dtype=fresh.dtype), fresh, self.layout.role(keys, fresh), self.wishes)
        return None if fitted.value is None else match, fitted

    def unused(self, tensors: Sequence[tuple[tuple[str, ...], Tensor]]) -> tuple[str, ...]:
        """Keys of the checkpoint that the network has no place for."""
        used = {key for keys, _ in tensors for key in self.correspondence.candidates(keys)}
        return tuple(key for key in self.source if key not in used)

    def _match(self, keys: tuple[str, ...]) -> tuple[str | None, str]:
        """The key of the checkpoint whose values the tensor takes, or None and the reason."""
        if self.layout.part(keys) == "head":
            return None, HEAD
        if self.stranger:
            return None, self.stranger
        candidates = self.correspondence.candidates(keys)
        if (
            candidates
            and self.trained is not None
            and not any(key.startswith(prefix) for key in candidates for prefix in self.trained)
        ):
            return None, NOT_TRAINED
        present = [key for key in candidates if key in self.source]
        return (present[-1], "") if present else (None, self.correspondence.why_missing(keys[0]))


def _wishes(
    source: Mapping[str, Tensor],
    target: nn.Module,
    layout: Layout,
    *,
    inflate: bool,
    resize_width: bool,
    source_grid: Sequence[int] | None,
    target_grid: Sequence[int] | None,
) -> Wishes:
    """What was asked for, and what is known of the positional embeddings."""
    before = tuple(source_grid) if source_grid is not None else None
    after = tuple(target_grid) if target_grid is not None else layout.token_grid
    return Wishes(
        inflate=inflate,
        resize_width=resize_width,
        transformer=layout.transformer,
        source_grid=before,
        source_prefix=_prefix(source, layout.positions, before),
        target_grid=after,
        target_prefix=_prefix(target.state_dict(), layout.positions, after),
    )


def _prefix(state: Mapping[str, Tensor], positions: str | None, grid: tuple[int, ...] | None) -> int:
    """Rows of the positional embedding before those of the image; embeddings of the grid alone have none."""
    if grid is not None and positions in state and state[positions].shape[1] == prod(grid):
        return 0
    return prefix_tokens(state)


def check_coverage(
    report: LoadReport, *, minimum: float = MIN_COVERAGE, differences: Sequence[str] = (), mend: str = ""
) -> None:
    """Refuse weights that leave most of the encoder fresh.

    Args:
        report: what :func:`adapt_weights` gave.
        minimum: smallest accepted fraction of the encoder's parameters, in [0, 1].
        differences: what :func:`architecture_differences` gave, where the checkpoint's network is known.
        mend: the command that writes a plan for the target with the checkpoint's network.

    Raises:
        UserError: below ``minimum``; it names the likeliest cause, the first tensors, and the command that mends it.
    """
    coverage = report.coverage("encoder")
    if coverage >= minimum:
        return
    fresh = [record for record in report.initialised() if record.part == "encoder" and record.parameters]
    lines = [f"Only {coverage:.1%} of the encoder's parameters come from the checkpoint; {minimum:.0%} are needed."]
    lines.append(f"The architectures differ: {'; '.join(differences[:3])}." if differences else _likely_cause(fresh))
    largest = {record.reason: record for record in sorted(fresh, key=lambda record: record.parameters)}
    lines += [
        f"  {record.keys[0]}: {record.reason}"
        for record in sorted(largest.values(), key=lambda record: -record.parameters)[:2]
    ]
    if differences and mend:
        remedy = f"Write a plan with the checkpoint's network, then adapt to it with -p:\n  {mend}"
    else:
        remedy = "Pretrain with this plan's architecture, or adapt to a plan of the checkpoint's with -p."
    raise UserError("\n".join(lines), remedy)


def architecture_differences(source: Mapping[str, Any] | None, target: Mapping[str, Any]) -> list[str]:
    """What differs between two networks, as a person would say it; nothing where one is not known.

    Args:
        source: class and arguments of the checkpoint's network (``provenance.describe_network``); None is unknown.
        target: the same of the plan.
    """
    if source is None or source == target:
        return []
    if source["class"] != target["class"]:
        return [f"{source['class'].rpartition('.')[2]} in pretraining, {target['class'].rpartition('.')[2]} here"]
    names = dict.fromkeys((*source["kwargs"], *target["kwargs"]))
    return [
        f"{name} is {_json(source['kwargs'].get(name))} in pretraining, {_json(target['kwargs'].get(name))} here"
        for name in names
        if source["kwargs"].get(name) != target["kwargs"].get(name)
    ]


def _shared(target: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of the state dict once, with all of its keys in order."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for key, tensor in target.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(key)
    return [(tuple(keys), tensor) for keys, tensor in groups.values()]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _likely_cause(fresh: Sequence[TensorRecord]) -> str:
    reasons = {record.reason for record in fresh}
    if reasons == {NOT_TRAINED}:
        return "Its pretraining did not train the encoder."
    if reasons == {MISSING}:
        return "The keys do not match: another kind of network, or a prefix such as 'module.' before its keys."
    if len(reasons) == 1:
        return f"{reasons.pop().capitalize()}."
    return "The architectures differ."
