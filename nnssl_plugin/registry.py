"""The one table of methods: what each is called, where it lives, whom to cite.

Adding a method means adding an entry here; ``tests/test_registry.py`` then asks for everything that the entry names.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper as it names itself. ``venue`` and ``year`` stay empty where its text does not say."""

    title: str
    authors: tuple[str, ...]
    venue: str = ""
    year: int | None = None


@dataclass(frozen=True)
class Method:
    """One pretraining method."""

    trainer: str
    """Dotted path of the nnU-Net trainer; its last part is what ``-tr`` takes."""
    settings: str
    """Dotted path of the dataclass behind the ``method`` part of a plan's ``pretraining`` block."""
    training: str
    """Dotted path of the method's default :class:`~nnssl_plugin.pretraining.settings.TrainingSettings`."""
    paper: Paper
    licence: str
    """SPDX identifier of our implementation (not of the paper's own code or weights)."""
    docs: str
    """Page, relative to the repository."""
    presets: tuple[str, ...]
    """Names for ``nnssl_plugin plan --preset``; the first is the recommendation."""


METHODS = {
    "med3dinsight": Method(
        trainer="nnssl_plugin.methods.med3dinsight.trainer.Med3DInsightPretrainer",
        settings="nnssl_plugin.methods.med3dinsight.settings.Settings",
        training="nnssl_plugin.methods.med3dinsight.settings.TRAINING",
        paper=Paper(
            title="Enhancing 3D Medical Image Understanding with Pretraining Aided by 2D Multimodal Large Language"
            " Models",
            authors=("Qiuhui Chen", "Xuancheng Yao", "Huping Ye", "Yi Hong"),
        ),
        licence="Apache-2.0",
        docs="docs/methods/med3dinsight.md",
        presets=("med3dinsight", "med3dinsight-paper"),
    ),
    "s2dc": Method(
        trainer="nnssl_plugin.methods.s2dc.trainer.S2DCPretrainer",
        settings="nnssl_plugin.methods.s2dc.settings.Settings",
        training="nnssl_plugin.methods.s2dc.settings.TRAINING",
        paper=Paper(
            title="Structure-aware Semantic Discrepancy and Consistency for 3D Medical Image Self-supervised Learning",
            authors=(
                "Tan Pan",
                "Zhaorui Tan",
                "Kaiyu Guo",
                "Dongli Xu",
                "Weidi Xu",
                "Chen Jiang",
                "Xin Guo",
                "Yuan Qi",
                "Yuan Cheng",
            ),
        ),
        licence="Apache-2.0",
        docs="docs/methods/s2dc.md",
        presets=("s2dc", "s2dc-paper", "s2dc-reference"),
    ),
}
"""Name (also that of the method's folder) → method."""
