"""What became of every tensor when weights were loaded: the load report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nnssl_plugin.files import write_json

Part = Literal["encoder", "decoder", "head"]
Status = Literal["copied", "adapted", "initialised"]
PARTS: tuple[Part, ...] = ("encoder", "decoder", "head")
COMPARED = {
    "normalisation": "intensities are normalised differently",
    "spacing_mm": "voxel spacing differs",
    "channels": "channels differ",
    "orientation": "images are oriented differently",
    "transpose_forward": "axes are transposed differently",
}
"""What makes a network see other images than it was pretrained on → how the warning names it."""
SPACING_TOLERANCE = 0.25
"""Relative difference in spacing (mm) below which nothing is said."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the target network."""

    keys: tuple[str, ...]
    """Its keys in the state dict; PlainConvUNet stores each convolution of the encoder under four."""
    part: Part
    status: Status
    reason: str
    """Why it was initialised or how it was adapted; empty where it was copied."""
    shape: tuple[int, ...]
    parameters: int
    """Learned numbers in it; 0 for buffers."""


@dataclass(frozen=True)
class LoadReport:
    """Every tensor of the target, each once, whatever the number of its keys."""

    tensors: tuple[TensorRecord, ...]
    unused: tuple[str, ...] = ()
    """Keys of the checkpoint that the target has no place for."""
    warnings: tuple[str, ...] = ()
    """Differences between what the weights were trained on and what they will see."""

    def coverage(self, part: Part) -> float:
        """Fraction of the parameters of a part that come from the checkpoint, in [0, 1]; 0 for a part of no size."""
        loaded, total = self.parameters(part)
        return loaded / total if total else 0.0

    def parameters(self, part: Part) -> tuple[int, int]:
        """Parameters of a part that come from the checkpoint, and all of them; shared ones counted once."""
        records = [record for record in self.tensors if record.part == part]
        loaded = sum(record.parameters for record in records if record.status != "initialised")
        return loaded, sum(record.parameters for record in records)

    def initialised(self) -> tuple[TensorRecord, ...]:
        """The tensors that start fresh."""
        return tuple(record for record in self.tensors if record.status == "initialised")

    def with_warnings(self, warnings: Sequence[str]) -> "LoadReport":
        """The same report with further warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def table(self) -> str:
        """A short table for people: one line per part, the reasons, the warnings."""
        lines = [f"{'part':<8} {'loaded':>12} {'of':>12} {'coverage':>9}  the rest"]
        for part in PARTS:
            loaded, total = self.parameters(part)
            fresh = sorted({r.reason for r in self.initialised() if r.part == part and r.parameters})
            rest = "; ".join(_shortened(fresh)) if total else "none in this network"
            lines.append(f"{part:<8} {loaded:>12,} {total:>12,} {self.coverage(part):>9.1%}  {rest}")
        if self.unused:
            lines.append(f"{len(self.unused)} tensors of the checkpoint have no place here, such as {self.unused[0]}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        counts = {part: self.parameters(part) for part in PARTS}
        return {
            "coverage": {part: self.coverage(part) for part in PARTS},
            "parameters": {part: {"loaded": loaded, "total": total} for part, (loaded, total) in counts.items()},
            "warnings": list(self.warnings),
            "unused": list(self.unused),
            "tensors": [asdict(record) for record in self.tensors],
        }

    def save(self, path: str | Path) -> None:
        """Write the whole report as JSON."""
        write_json(path, self.as_dict())


def compare_inputs(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """What the network will see otherwise than in pretraining, a line per difference.

    Args:
        source: ``provenance`` of the checkpoint (what ``provenance.describe_input`` gives); an empty one says nothing.
        target: ``provenance.describe_input`` of the target.
    """
    return [
        f"{said}: {source[field]} in pretraining, {target[field]} here"
        for field, said in COMPARED.items()
        if field in source and _differs(field, source[field], target[field])
    ]


def _differs(field: str, before: Any, now: Any) -> bool:
    if field != "spacing_mm" or len(before) != len(now):
        return before != now
    return any(abs(a - b) > SPACING_TOLERANCE * max(a, b) for a, b in zip(before, now, strict=True))


def _shortened(reasons: Sequence[str], limit: int = 2) -> list[str]:
    if len(reasons) <= limit:
        return list(reasons)
    return [*reasons[:limit], f"and {len(reasons) - limit} more reasons (in the JSON report)"]
