"""How long and how fast a method is trained: the ``pretraining`` block of a plan."""

from dataclasses import dataclass

from nnssl_plugin.errors import UserError


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast a method is trained: the ``pretraining`` block of a plan, except its ``method`` part."""

    epochs: int = 300
    iterations_per_epoch: int = 250
    validation_iterations: int = 10
    batch_size: int | None = None
    """Samples per rank and step; ``None`` keeps the plan's batch size."""
    chunk_size: int | None = None
    """Samples encoded at a time; fewer than ``batch_size`` make a virtual batch: its gradients at the memory of a chunk
    and the cost of one more forward. ``None`` encodes the batch at once."""
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine to 0."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient (12 is nnU-Net's)."""
    seed: int = 12345
    figure_every: int = 10
    """Epochs between two pictures of reconstructions and the like."""
    max_skipped_in_a_row: int = 50
    """Steps with a non-finite loss or gradient in a row that end the run."""

    def __post_init__(self) -> None:
        counts = ("epochs", "iterations_per_epoch", "figure_every", "max_skipped_in_a_row")
        fine = {name: getattr(self, name) >= 1 for name in counts}
        sizes = {name: getattr(self, name) for name in ("batch_size", "chunk_size")}
        fine |= {name: size is None or (type(size) is int and size >= 1) for name, size in sizes.items()}
        fine |= {"validation_iterations": self.validation_iterations >= 0}
        fine |= {name: getattr(self, name) > 0 for name in ("lr", "gradient_clip")}
        fine |= {name: getattr(self, name) >= 0 for name in ("weight_decay", "warmup_epochs", "seed")}
        wrong = next((name for name, ok in fine.items() if not ok), None)
        if wrong is not None:
            raise UserError(
                f"Setting '{wrong}' of the pretraining block cannot be {getattr(self, wrong)!r}.",
                f"nnssl_plugin plan -d ID -n NAME --set {wrong}=VALUE",
            )
