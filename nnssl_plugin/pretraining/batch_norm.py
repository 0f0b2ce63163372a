"""Batch normalisation while pretraining: when it is refused, and what its running statistics must survive."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.training.distributed import mean_over_ranks


def check_batch_norm(
    task: PretextTask, settings: TrainingSettings, *, device: torch.device, several_ranks: bool
) -> None:
    """Refuse settings that a network with batch normalisation cannot have.

    Raises:
        UserError: for chunks, which would each be normalised by themselves, or for ranks that shall normalise together
            without CUDA.
    """
    backbones = (module for module in task.modules() if isinstance(module, Backbone))
    network = next((backbone.network for backbone in backbones if _normalises_batches(backbone)), None)
    if network is None:
        return
    if settings.chunk_size is not None:
        raise UserError(
            f"{type(network).__name__} has batch normalisation, and with chunk_size={settings.chunk_size} each chunk "
            "would be normalised by itself: its gradients would not be those of the batch.",
            "Encode the batch at once: nnssl_plugin plan -d ID -p PLANS -n NAME --set chunk_size=null",
        )
    if settings.batch_norm == "synchronised" and several_ranks and device.type != "cuda":
        raise UserError(
            "batch_norm=synchronised works on CUDA alone.",
            "Average the statistics instead: nnssl_plugin plan -d ID -p PLANS -n NAME --set batch_norm=averaged",
        )


class RunningStatistics:
    """What normalisation layers remember of the batches: kept through skipped steps, and equal on all ranks.

    A forward pass changes them before anyone can know whether the step counts. Nothing here waits for the device.

    Args:
        task: with the layers, if it has any.
    """

    def __init__(self, task: nn.Module):
        self._layers = [module for module in task.modules() if isinstance(module, _NormBase)]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Before the forward passes of a step."""
        self._before = [_flat(buffers) for buffers in self._buffers()]

    @torch.no_grad()
    def settle(self, applied: Tensor) -> None:
        """After the optimiser's step: the ranks' mean where it was applied, else what was remembered, bit for bit.

        Args:
            applied: () bool on the device, alike on all ranks.
        """
        for buffers, before in zip(self._buffers(), self._before, strict=True):
            now = _flat(buffers)
            now = mean_over_ranks(now) if now.is_floating_point() else now
            settled = torch.where(applied, now, before).split([buffer.numel() for buffer in buffers])
            for buffer, value in zip(buffers, settled, strict=True):
                buffer.copy_(value.view_as(buffer))

    def _buffers(self) -> list[list[Tensor]]:
        """Means and variances, and counters of batches; kinds that there are none of are left out."""
        buffers = [buffer for layer in self._layers for buffer in layer.buffers(recurse=False)]
        kinds = ([b for b in buffers if b.is_floating_point() == floating] for floating in (True, False))
        return [kind for kind in kinds if kind]


def _normalises_batches(module: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers])
