"""One tensor of a checkpoint in the shape of one of a network: which rules apply, in which order, and what is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nnssl_plugin.checkpoints.adaptation import rules
from nnssl_plugin.checkpoints.adaptation.correspondence import Role
from nnssl_plugin.checkpoints.adaptation.options import DEFAULT_OPTIONS, AdaptationOptions
from nnssl_plugin.errors import UserError

RESIZED = {
    "kernel": (rules.kernel, "kernel"),
    "patch": (rules.patch_kernel, "embedded patch"),
    "upsampling": (rules.upsampling, "upsampling stride"),
}
"""Kind of a tensor with a kernel → how the kernel takes another size, and what it is called."""


@dataclass(frozen=True)
class TokenLayout:
    """What is known of the tokens of the checkpoint and of the network; nothing where both are convolutional."""

    transformer: bool = False
    """Attention heads are cut out of the width, so it is never resized."""
    source_grid: tuple[int, ...] | None = None
    target_grid: tuple[int, ...] | None = None
    source_prefix: int = 0
    """Tokens before those of the image in the checkpoint."""
    target_prefix: int = 0


@dataclass(frozen=True)
class Fitted:
    """What became of a tensor."""

    value: Tensor | None
    """None where it does not fit."""
    reason: str = ""
    """How it was adapted, or why it does not fit; empty for an exact copy."""
    taken: int = 0
    """How many numbers of ``value`` come from the checkpoint."""


def fit(
    values: Tensor,
    fresh: Tensor,
    role: Role,
    options: AdaptationOptions = DEFAULT_OPTIONS,
    layout: TokenLayout = TokenLayout(),
) -> Fitted:
    """``values`` in the shape of ``fresh``, by the rules for its role; an equal shape is an exact copy.

    Args:
        values: tensor of the checkpoint, of the type of ``fresh``.
        fresh: initialised tensor of the network; what has no counterpart keeps its values.
        role: what the tensor is for.
        options: what is asked for.
        layout: of the tokens, where the network is a transformer.

    Raises:
        UserError: for a positional embedding whose grid of tokens is needed and not known.
    """
    if role.kind == "positions":
        return _fit_positions(values, fresh, options, layout)
    if values.shape == fresh.shape:
        return Fitted(values, taken=values.numel())
    if role.kind == "tokens" and values.shape[2:] == fresh.shape[2:]:
        value, kept = _tokens(values, fresh)
        return Fitted(value, f"tokens {values.shape[1]} → {fresh.shape[1]}", kept * fresh.shape[2])
    if role.kind == "per channel" and values.dim() == 1:
        return _fit_width(values, fresh, role, options, layout, [])
    if role.kind in RESIZED and values.dim() in (4, 5):
        return _fit_kernel(values, fresh, role, options, layout)
    return Fitted(None, f"shape {_by(values.shape)} in the checkpoint, {_by(fresh.shape)} here")


def _fit_kernel(values: Tensor, fresh: Tensor, role: Role, options: AdaptationOptions, layout: TokenLayout) -> Fitted:
    steps = []
    if values.dim() != fresh.dim():
        change = f"{values.dim() - 2}D → {fresh.dim() - 2}D"
        if not options.inflate:
            return Fitted(None, f"{change} (--inflate adapts it)")
        mean = role.kind == "upsampling"
        values = (
            rules.inflate(values, fresh.shape[2], mean=not mean)
            if fresh.dim() > values.dim()
            else rules.flatten(values, mean=mean)
        )
        steps.append(change)
    if role.reads_image and values.shape[1] != fresh.shape[1]:
        steps.append(f"input channels {values.shape[1]} → {fresh.shape[1]}")
        values = rules.input_channels(values, fresh.shape[1])
    if values.shape[2:] != fresh.shape[2:]:
        rule, name = RESIZED[role.kind]
        steps.append(f"{name} {_by(values.shape[2:])} → {_by(fresh.shape[2:])}")
        values = rule(values, fresh.shape[2:])
    if values.shape == fresh.shape:
        return Fitted(values, "; ".join(steps), values.numel())
    return _fit_width(values, fresh, role, options, layout, steps)


def _fit_width(
    values: Tensor, fresh: Tensor, role: Role, options: AdaptationOptions, layout: TokenLayout, steps: list[str]
) -> Fitted:
    axis = 1 if role.kind == "upsampling" else 0
    if not options.resize_width or layout.transformer:
        advice = "a transformer's is never resized" if layout.transformer else "--resize-width takes the first channels"
        return Fitted(None, f"width {_by(values.shape[:2])} in the checkpoint, {_by(fresh.shape[:2])} here ({advice})")
    value, taken = rules.first_channels(values, fresh, out_axis=axis, parts=role.parts)
    return Fitted(value, "; ".join([*steps, f"width {_by(values.shape[:2])} → {_by(fresh.shape[:2])}"]), taken)


def _fit_positions(values: Tensor, fresh: Tensor, options: AdaptationOptions, layout: TokenLayout) -> Fitted:
    if values.shape[-1] != fresh.shape[-1]:
        return Fitted(
            None,
            f"width {values.shape[-1]} in the checkpoint, {fresh.shape[-1]} here (a transformer's is never resized)",
        )
    before, after = layout.source_grid, layout.target_grid
    moved = before is not None and after is not None and before != after
    if values.shape == fresh.shape and not moved:
        return Fitted(values, taken=values.numel())
    first, own = values[:, : layout.source_prefix], values[:, layout.source_prefix :]
    prefix, tokens = layout.target_prefix, fresh.shape[1] - layout.target_prefix
    steps = [f"prefix tokens {first.shape[1]} → {prefix}"] if first.shape[1] != prefix else []
    if moved or own.shape[1] != tokens:
        after = _grid(after, tokens, "network", len(before or (0, 0, 0)))
        before = _grid(before, own.shape[1], "checkpoint", len(after))
        if len(before) > len(after) or (len(before) < len(after) and not options.inflate):
            return Fitted(None, f"{len(before)}D → {len(after)}D (--inflate adapts 2D ones)")
        steps.append(f"positions {_by(before)} → {_by(after)}")
        own = rules.positions(own, (1,) * (len(after) - len(before)) + before, after)
    value, kept = _tokens(first, fresh[:, :prefix])
    return Fitted(torch.cat((value, own), 1), "; ".join(steps), (kept + tokens) * fresh.shape[2])


def _tokens(values: Tensor, fresh: Tensor) -> tuple[Tensor, int]:
    """The first tokens from ``values``, those beyond them from ``fresh``, and how many were taken; (1, tokens, C)."""
    kept = min(values.shape[1], fresh.shape[1])
    return torch.cat((values[:, :kept], fresh[:, kept:]), 1), kept


def _grid(grid: tuple[int, ...] | None, tokens: int, whose: str, dimensions: int) -> tuple[int, ...]:
    """The known grid, held against the number of tokens; else the only one that there is."""
    possible = [grid] if grid is not None else rules.grids(tokens, dimensions)
    if len(possible) == 1 and prod(possible[0]) == tokens:
        return possible[0]
    if grid is not None:
        raise UserError(
            f"The positional embedding of the {whose} has {tokens} tokens, its grid would be {_by(grid)}.",
            "Name the grid with --token-grid: the patch in voxels divided by that of an embedded patch.",
        )
    raise UserError(
        f"The positional embedding of the {whose} has {tokens} tokens; over which grid is not known.",
        "Name the checkpoint's with --token-grid, for example --token-grid 8 8 8: the patch in voxels "
        "divided by that of an embedded patch."
        if whose == "checkpoint"
        else "Use a network with rotary embeddings, which knows its grid, or pass target_grid.",
    )


def _by(sizes: Sequence[int]) -> str:
    return "×".join(str(size) for size in sizes) or "()"
