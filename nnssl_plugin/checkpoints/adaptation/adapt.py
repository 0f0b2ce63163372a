"""From (weights, network) to (state dict, report): which tensor of the network gets which values, and why.

The rules by which a tensor takes another shape are in ``rules.py``, with what each preserves; which tensors belong
together, where stages and blocks differ in number, is in ``correspondence.py``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.checkpoints.adaptation.correspondence import MISSING, Correspondence, Layout, prefix_tokens
from nnssl_plugin.checkpoints.adaptation.fitting import Fitted, TokenLayout, fit
from nnssl_plugin.checkpoints.adaptation.options import DEFAULT_OPTIONS, AdaptationOptions
from nnssl_plugin.checkpoints.adaptation.report import LoadReport, TensorRecord
from nnssl_plugin.checkpoints.format.tensors import check_finite, parameters_in
from nnssl_plugin.checkpoints.sources.mappings import shipped_mappings
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some
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
    options: AdaptationOptions = DEFAULT_OPTIONS,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The complete state dict of ``target`` with every tensor of ``source`` that was trained and can be made to fit.

    Neither argument is changed. The state dict is on the CPU; it shares memory with ``source`` where nothing had to
    be adapted, and with ``target`` where nothing was loaded: load it, or copy it, before either is trained on. Keys of
    ``target`` that share their memory (``encoder.*`` and ``decoder.encoder.*``) get one tensor; where ``source``
    holds several values for it, that of the first key counts, the network's own name for it, and the report warns.
    Weights of another family of networks are not loaded at all.

    Args:
        source: state dict of the pretrained network, without prefixes such as ``module.``.
        target: the network to be trained; its present values are the initialisation of what is not loaded.
        trained: prefixes of the keys that pretraining trained; ``None`` when all were. Other tensors, and the
            segmentation layers, stay fresh even where they would fit, and are reported as initialised.
        options: changes of shape that are asked for, and the grids of tokens, where they are known.

    Raises:
        UserError: when ``source`` holds values that are not finite, or a positional embedding whose grid must be known
            and is not.
    """
    layout, tensors, order = Layout(target), shared_tensors(target), list(target.state_dict())
    adapter = _Adapter(source, target, layout, trained, options)
    matches = [adapter.match(keys) for keys, _ in tensors]
    check_finite({key: source[key] for key, _ in matches if key is not None}, "The checkpoint")
    parameters = {id(p) for p in target.parameters()}
    state: dict[str, Tensor] = {}
    records = []
    for (keys, tensor), (match, reason) in zip(tensors, matches, strict=True):
        fresh = tensor.detach().cpu()
        fitted = Fitted(None, reason) if match is None else adapter.fitted(match, keys, fresh)
        state.update(dict.fromkeys(keys, fresh if fitted.value is None else fitted.value.contiguous()))
        learned = id(tensor) in parameters
        records.append(
            TensorRecord(
                keys=keys,
                part=layout.part(keys),
                reason=fitted.reason,
                shape=tuple(tensor.shape),
                source=None if fitted.value is None else match,
                status="initialised" if fitted.value is None else "adapted" if fitted.reason else "copied",
                parameters=tensor.numel() if learned else 0,
                loaded=fitted.taken if learned else 0,
            )
        )
    unused = adapter.unused(tensors)
    placed = [record.source for record in records if record.part == "encoder" and record.source]
    report = LoadReport(
        tuple(records),
        unused,
        tuple(adapter.differing_copies(tensors)),
        placed=parameters_in({key: source[key] for key in placed}),
        unplaced=parameters_in({key: source[key] for key in unused if adapter.is_unexplained(key)}),
    )
    return {key: state[key] for key in order}, report


class _Adapter:
    """What a checkpoint has for each tensor of a network."""

    def __init__(
        self,
        source: Mapping[str, Tensor],
        target: nn.Module,
        layout: Layout,
        trained: Sequence[str] | None,
        options: AdaptationOptions,
    ):
        order = list(target.state_dict())
        self.source, self.layout, self.trained, self.options = source, layout, trained, options
        self.tokens = _token_layout(source, target, layout, options)
        self.correspondence = Correspondence(source, order)
        self._places = {_without_numbers(key) for key in order}
        before, now = family_of_keys(source), family_of_keys(order)
        differ = before and now and before != now
        self.other_family = f"the checkpoint holds a {before.name}, this network is a {now.name}" if differ else ""

    def match(self, keys: tuple[str, ...]) -> tuple[str | None, str]:
        """The key of the checkpoint whose values the tensor under ``keys`` takes, or None and the reason."""
        if self.layout.part(keys) == "head":
            return None, HEAD
        if self.other_family:
            return None, self.other_family
        candidates = self.correspondence.candidates(keys)
        if candidates and not any(map(self._was_trained, candidates)):
            return None, NOT_TRAINED
        present = [key for key in candidates if key in self.source]
        return (present[0], "") if present else (None, self.correspondence.why_missing(keys[0]))

    def fitted(self, match: str, keys: tuple[str, ...], fresh: Tensor) -> Fitted:
        """The checkpoint's tensor ``match`` in the shape of ``fresh`` (on the CPU), the network's under ``keys``."""
        values = self.source[match].detach().to(device="cpu", dtype=fresh.dtype)
        return fit(values, fresh, self.layout.role(keys, fresh), self.options, self.tokens)

    def unused(self, tensors: Sequence[tuple[tuple[str, ...], Tensor]]) -> tuple[str, ...]:
        """Keys of the checkpoint that the network has no place for."""
        used = {key for keys, _ in tensors for key in self.correspondence.candidates(keys)}
        return tuple(key for key in self.source if key not in used)

    def is_unexplained(self, key: str) -> bool:
        """Whether an unused key was trained, lies below the encoder's, and is no further stage or block of it."""
        below = self.layout.part((key,)) == "encoder" and self._was_trained(key)
        return below and _without_numbers(key) not in self._places

    def differing_copies(self, tensors: Sequence[tuple[tuple[str, ...], Tensor]]) -> list[str]:
        """A warning where the checkpoint holds several values for one tensor of the network."""
        present = [[key for key in self.correspondence.candidates(keys) if key in self.source] for keys, _ in tensors]
        differing = [
            (first, key) for first, *copies in filter(None, present) for key in copies if self._differ(first, key)
        ]
        if not differing:
            return []
        first, copy = differing[0]
        return [
            f"the checkpoint holds copies that differ of {len({key for key, _ in differing})} shared tensors: "
            f"{first} was taken, the network's own name, not {copy}"
        ]

    def _differ(self, first: str, second: str) -> bool:
        one, other = self.source[first], self.source[second]
        return one.data_ptr() != other.data_ptr() and not torch.equal(one, other)

    def _was_trained(self, key: str) -> bool:
        return self.trained is None or key.startswith(tuple(self.trained))


def _token_layout(
    source: Mapping[str, Tensor], target: nn.Module, layout: Layout, options: AdaptationOptions
) -> TokenLayout:
    """What is known of the tokens of both; the network's rotary embedding tells its grid where the options do not."""
    before = tuple(options.source_grid) if options.source_grid is not None else None
    after = tuple(options.target_grid) if options.target_grid is not None else layout.token_grid
    return TokenLayout(
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


def _without_numbers(key: str) -> str:
    """A key without the numbers of its stages and blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", key)


def check_coverage(
    report: LoadReport,
    *,
    minimum: float = MIN_COVERAGE,
    differences: Sequence[str] = (),
    mend: str = "",
    tables: Sequence[str] = (),
) -> None:
    """Refuse weights that leave most of the encoder fresh, or of which most of the encoder has no place.

    Args:
        report: what :func:`adapt_weights` gave.
        minimum: smallest accepted fraction, in both directions, in [0, 1].
        differences: what :func:`architecture_differences` gave, where the checkpoint's network is known.
        mend: the command that writes a plan for the target with the checkpoint's network.
        tables: tables of this package (``--mapping``) whose network the weights fill.

    Raises:
        UserError: below ``minimum``; it names the likeliest cause, the first tensors, and the command that mends it.
    """
    if report.covers(minimum):
        return
    coverage = report.coverage("encoder")
    fresh = [record for record in report.initialised() if record.part == "encoder" and record.parameters]
    cause = f"The architectures differ: {'; '.join(differences[:3])}." if differences else _likely_cause(fresh)
    if coverage < minimum:
        largest = {record.reason: record for record in sorted(fresh, key=lambda record: record.parameters)}
        said = f"Only {coverage:.1%} of the encoder's parameters come from the checkpoint; {minimum:.0%} are needed."
        shown = [
            f"  {record.keys[0]}: {record.reason}"
            for record in sorted(largest.values(), key=lambda record: -record.parameters)[:2]
        ]
    else:
        said = (
            f"Only {report.checkpoint_coverage:.1%} of the checkpoint's encoder has a place in this network "
            f"({report.unplaced:,} parameters have none); {minimum:.0%} are needed."
        )
        cause = cause if differences else "It belongs to another network."
        shown = [f"  no place for {some(report.unused)}"]
    if coverage == 0 and report.unused and {record.reason for record in fresh} == {MISSING}:
        shown.append(f"  the checkpoint's first keys: {some(report.unused)}")
    raise UserError("\n".join([said, cause, *shown]), _remedy(differences, mend, tables, no_key=coverage == 0))


def _remedy(differences: Sequence[str], mend: str, tables: Sequence[str], *, no_key: bool) -> str:
    if tables:
        plan = f", with a plan that has its network:\n  {mend}" if mend else "."
        return f"These weights fill the network of the table {' or '.join(tables)}: --mapping {tables[0]}{plan}"
    if differences and mend:
        return f"Write a plan with the checkpoint's network, then adapt to it with -p:\n  {mend}"
    if no_key and not differences:
        return (
            "Rename its keys: --mapping TABLE, with one of "
            f"{', '.join(shipped_mappings())}, or a table of your own (docs/reference/weight-sources.md)."
        )
    return "Pretrain with this plan's architecture, or adapt to a plan of the checkpoint's with -p."


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


def shared_tensors(target: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
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
