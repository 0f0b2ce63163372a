"""Self-supervised pretraining for nnU-Net v2, through nnU-Net's own commands."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl_plugin.api import caption as caption
    from nnssl_plugin.api import prepare as prepare
    from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint as adapt
    from nnssl_plugin.checkpoints.sources.inspection import inspect_file as inspect
    from nnssl_plugin.features.pretrained_backbone import load_backbone as load_backbone
    from nnssl_plugin.tasks.retrieval.index import load_index as load_index
    from nnssl_plugin.tasks.segmentation.evaluation import evaluate_segmentation as evaluate_segmentation

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "adapt",
    "caption",
    "evaluate_segmentation",
    "inspect",
    "load_backbone",
    "load_index",
    "prepare",
]

FUNCTIONS = {
    "prepare": "nnssl_plugin.api.prepare",
    "caption": "nnssl_plugin.api.caption",
    "adapt": "nnssl_plugin.checkpoints.adaptation.finetuning_plan.adapt_checkpoint",
    "inspect": "nnssl_plugin.checkpoints.sources.inspection.inspect_file",
    "load_backbone": "nnssl_plugin.features.pretrained_backbone.load_backbone",
    "load_index": "nnssl_plugin.tasks.retrieval.index.load_index",
    "evaluate_segmentation": "nnssl_plugin.tasks.segmentation.evaluation.evaluate_segmentation",
}
"""Name → dotted path: imported when first asked for, as torch and nnU-Net take seconds (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = FUNCTIONS[name].rpartition(".")
    globals()[name] = found = getattr(import_module(module), function)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
