"""The contract of a pretraining method: a :class:`PretextTask` that knows nothing of nnU-Net.

A method is an ``nn.Module`` that owns a backbone and whatever else it trains. The pretrainer
(``nnssl_plugin/pretraining/pretrainer.py``) owns data, optimiser, schedule, precision, ranks, checkpoints and logs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_plugin.data.batch import Batch, Needs
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.training.pictures import Colours, Overlay

Views = dict[str, Tensor]
Terms = dict[str, Tensor]


class PretextTask(nn.Module):
    """One pretraining method: backbone, heads, views and losses.

    Args:
        backbone: the network that nnU-Net built from the plan, with ways to read features out of it.
        settings: an instance of the method's frozen dataclass.
    """

    needs: Needs = Needs()
    trained_parts: Sequence[str] = ("encoder", "decoder")
    """Parts of the backbone's network that the losses reach; the others are frozen and reported as initialised."""
    gathers: bool = True
    """Whether ``loss`` sees the samples of all ranks. ``False``: of its own rank alone, and the gradient is that of the
    mean over the ranks; what the task's state keeps of samples is then gathered in ``loss`` by ``self.gather``, so that
    ranks keep the same state."""

    def __init__(self, backbone: Backbone, settings: Any):
        super().__init__()
        self.backbone = backbone
        self.settings = settings
        self.gather: Callable[[Views], Views] = _identity
        backbone.train_only(self.trained_parts)

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """Everything random: the tensors that ``encode`` reads, B samples each, on the device, without gradient."""
        raise _missing(self, "views")

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """Per-sample outputs (B, ...), and losses (B,) that each sample has alone.

        Samples must not interact here, nor may the task's state change: a virtual batch encodes each sample twice.
        """
        raise _missing(self, "encode")

    def loss(self, outputs: Views, progress: float) -> Terms:
        """Scalar terms that couple samples, of all ranks where :attr:`gathers`.

        ``progress`` is the fraction of training done, below 1.
        """
        return {}

    def weights(self, progress: float) -> dict[str, float]:
        """The factor of each term in the total; 1 for terms that are not named."""
        return {}

    def forward(self, views: Views, progress: float) -> Terms:
        """``encode``, then ``terms``."""
        return self.terms(*self.encode(views), progress)

    def terms(self, outputs: Views, own: Terms, progress: float) -> Terms:
        """Means of the samples' own losses, ``loss`` over the gathered outputs, and their weighted sum as ``total``."""
        terms = {name: value.mean() for name, value in own.items()}
        terms |= self.loss(self.gather(outputs) if self.gathers else outputs, progress)
        weights = self.weights(progress)
        terms["total"] = sum(weights.get(name, 1.0) * value for name, value in terms.items())
        return terms

    @torch.no_grad()
    def on_weights_loaded(self) -> None:
        """Starting weights were put into the backbone: copy them into whatever else must start from them (teachers)."""

    @torch.no_grad()
    def after_step(self, progress: float, applied: Tensor) -> None:
        """Update teachers, queues and projections.

        Args:
            progress: fraction of training done.
            applied: () bool on the device, False where the step was skipped because its loss was not finite.
                It is never read on the host: multiply or ``torch.where`` with it.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: ``lr_scale`` multiplies the scheduled rate, ``clip=False`` is left unclipped."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Numbers to log once per epoch, on one validation batch; ``features`` (B, F) feeds the collapse measures."""
        return {}

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor | Overlay | Colours]]]:
        """Pictures to draw every few epochs: file name → titled images of the first sample, grey where a tensor."""
        return {}


def _identity(outputs: Views) -> Views:
    return outputs


def _missing(task: PretextTask, method: str) -> TypeError:
    return TypeError(f"{type(task).__name__} must define {method}()")
