"""Options of an adaptation: the changes of shape that are made only when asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptationOptions:
    """What is asked for, from the command line down to the single tensor."""

    inflate: bool = False
    """Also adapt 2D kernels to a 3D network, and 3D ones to a 2D network."""
    resize_width: bool = False
    """Also adapt layers of other widths, by their first channels; never in a transformer."""
    source_grid: tuple[int, ...] | None = None
    """Tokens per axis of the checkpoint's positional embedding (patch in voxels divided by the size of an embedded
    patch), where the checkpoint does not tell."""
    target_grid: tuple[int, ...] | None = None
    """The same of the network, where the plan does not tell; its rotary embedding is asked otherwise."""


DEFAULT_OPTIONS = AdaptationOptions()
"""Nothing but what needs no asking."""
