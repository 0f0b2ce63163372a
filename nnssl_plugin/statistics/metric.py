"""What summaries, comparisons, tables and figures need to know of a metric."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric of a task."""

    name: str
    """In tables and code."""
    title: str
    """In figures and printed tables, with its unit."""
    key: str = ""
    """In JSON; empty: the name."""
    lower_is_better: bool = False
    per_class: bool = False
    """Whether it is also given for each class against the rest."""
    overall: bool = True
    """Whether there is one number for all classes together."""
    digits: int = 4
    """After the decimal point, in printed tables."""

    def __post_init__(self):
        object.__setattr__(self, "key", self.key or self.name)
