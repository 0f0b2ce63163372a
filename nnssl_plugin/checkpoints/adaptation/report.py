"""What became of every tensor when weights were loaded: the load report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nnssl_plugin.io.files import write_json

Part = Literal["encoder", "decoder", "head"]
Status = Literal["copied", "adapted", "initialised"]
PARTS: tuple[Part, ...] = ("encoder", "decoder", "head")


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
    loaded: int = 0
    """Those of them that come from the checkpoint, all or part of them."""
    source: str | None = None
    """Key of the checkpoint that they come from; another one than its own where stages are numbered otherwise."""


@dataclass(frozen=True)
class LoadReport:
    """Every tensor of the target, each once, whatever the number of its keys."""

    tensors: tuple[TensorRecord, ...]
    unused: tuple[str, ...] = ()
    """Keys of the checkpoint that the target has no place for."""
    warnings: tuple[str, ...] = ()
    """Differences between what the weights were trained on and what they will see."""
    notes: tuple[str, ...] = ()
    """What was carried beside the weights, and how."""
    placed: int = 0
    """Parameters of the checkpoint that the encoder took."""
    unplaced: int = 0
    """Parameters of the checkpoint below the encoder's keys that this encoder has no place for, without those of
    further stages and blocks, which a smaller network leaves out."""

    def coverage(self, part: Part) -> float:
        """Fraction of the parameters of a part that come from the checkpoint, in [0, 1]; 0 for a part of no size."""
        loaded, total = self.parameters(part)
        return loaded / total if total else 0.0

    @property
    def checkpoint_coverage(self) -> float:
        """Fraction of the checkpoint's encoder that has a place in this one, in [0, 1]; 1 where it holds none."""
        total = self.placed + self.unplaced
        return self.placed / total if total else 1.0

    def covers(self, minimum: float) -> bool:
        """Whether enough of the encoder comes from the checkpoint, and enough of the checkpoint's has a place."""
        return min(self.coverage("encoder"), self.checkpoint_coverage) >= minimum

    def parameters(self, part: Part) -> tuple[int, int]:
        """Parameters of a part that come from the checkpoint, and all of them; shared ones counted once."""
        records = [record for record in self.tensors if record.part == part]
        return sum(record.loaded for record in records), sum(record.parameters for record in records)

    def initialised(self) -> tuple[TensorRecord, ...]:
        """The tensors that start fresh."""
        return tuple(record for record in self.tensors if record.status == "initialised")

    def adapted(self) -> tuple[TensorRecord, ...]:
        """The tensors that took another shape."""
        return tuple(record for record in self.tensors if record.status == "adapted")

    def with_warnings(self, warnings: Sequence[str]) -> "LoadReport":
        """The same report with further warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def with_notes(self, notes: Sequence[str]) -> "LoadReport":
        """The same report with further notes."""
        return replace(self, notes=(*self.notes, *notes))

    def table(self) -> str:
        """A short table for people: one line per part, what was adapted, the reasons, the warnings."""
        lines = [f"{'part':<8} {'loaded':>12} {'of':>12} {'coverage':>9}  the rest"]
        for part in PARTS:
            loaded, total = self.parameters(part)
            fresh = sorted({r.reason for r in self.initialised() if r.part == part and r.parameters})
            rest = "; ".join(_shortened(fresh)) if total else "none in this network"
            lines.append(f"{part:<8} {loaded:>12,} {total:>12,} {self.coverage(part):>9.1%}  {rest}")
        changes = Counter(record.reason for record in self.adapted()).most_common()
        if changes:
            lines.append("adapted: " + "; ".join(_shortened([f"{how} ({_tensors(n)})" for how, n in changes], limit=4)))
        if self.unused:
            lines.append(f"no place here for {_tensors(len(self.unused))} of the checkpoint, such as {self.unused[0]}")
        if self.unplaced:
            lines.append(
                f"of the checkpoint's encoder {self.placed:,} of {self.placed + self.unplaced:,} parameters are here "
                f"({self.checkpoint_coverage:.1%})"
            )
        lines += self.notes
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        counts = {part: self.parameters(part) for part in PARTS}
        return {
            "coverage": {part: self.coverage(part) for part in PARTS},
            "parameters": {part: {"loaded": loaded, "total": total} for part, (loaded, total) in counts.items()},
            "checkpoint": {"placed": self.placed, "unplaced": self.unplaced},
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "unused": list(self.unused),
            "tensors": [asdict(record) for record in self.tensors],
        }

    def save(self, path: str | Path) -> None:
        """Write the whole report as JSON."""
        write_json(path, self.as_dict())


def _shortened(reasons: Sequence[str], limit: int = 2) -> list[str]:
    if len(reasons) <= limit:
        return list(reasons)
    return [*reasons[:limit], f"and {len(reasons) - limit} more reasons (in the JSON report)"]


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count > 1 else ''}"
