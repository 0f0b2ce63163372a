"""The one table of methods and trainers: what each is called, where it lives, what it needs, whom to cite.

Adding a method means adding an entry here. ``docs/generate.py`` writes the tables of the pages and the citations from
it, and ``tests/test_registry.py`` asks for everything that an entry names.
"""

from dataclasses import dataclass, field

NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "Primus", "SwinUNETR", "SegResNetDS", "PatchViT")
"""Families of networks whose features, tokens and reconstructions can be read, by the names of their classes."""
PLANAR_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResNetUNet", "SAMUNet", "PatchViT")
"""Those of them that serve 2D configurations, with those that serve nothing else."""


@dataclass(frozen=True)
class Paper:
    """A paper as it names itself. What its text does not say stays empty."""

    title: str
    authors: tuple[str, ...]
    """Given names first; the last word is the family name."""
    venue: str = ""
    year: int | None = None
    doi: str = ""
    url: str = ""


@dataclass(frozen=True)
class Method:
    """One pretraining method."""

    title: str
    """How the paper calls it."""
    summary: str
    """What is learned, in one line of a table."""
    trainer: str
    """Dotted path of the nnU-Net trainer; its last part is what ``-tr`` takes."""
    settings: str
    """Dotted path of the dataclass behind the ``method`` part of a plan's ``pretraining`` block."""
    training: str
    """Dotted path of the method's default :class:`~nnssl_plugin.pretraining.settings.TrainingSettings`."""
    trains: tuple[str, ...]
    """Parts of the planned network that are pretrained, as the task's ``trained_parts``."""
    needs: str
    """What it needs beside unlabelled scans; empty where that is all."""
    dimensions: tuple[int, ...]
    """Of the configurations that it takes: 2, 3, or both."""
    paper: Paper
    licence: str
    """SPDX identifier of our implementation (not of the paper's own code or weights)."""
    docs: str
    """Page, relative to the repository."""
    presets: dict[str, str] = field(default_factory=dict)
    """Name for ``nnssl_plugin plan --preset`` → what it is; the first is the recommendation."""
    networks: tuple[str, ...] = NETWORKS
    """Families of networks that it pretrains."""
    finetuning: str = "segmentation"
    """Which of :data:`TASKS` segments from its weights where its arrays came along, if it learned any."""
    alignment: str = ""
    """Dotted path of what makes the learned alignment of volumes with texts, of the state of its task and its settings;
    empty where there is none."""

    @property
    def trainer_name(self) -> str:
        """What ``nnUNetv2_train -tr`` takes."""
        return self.trainer.rpartition(".")[2]

    @property
    def package(self) -> str:
        """Dotted name of the folder that holds its ``settings``, ``objective`` and ``trainer``."""
        return self.trainer.rsplit(".", 2)[0]


@dataclass(frozen=True)
class Task:
    """One way to use pretrained weights, through a trainer of its own."""

    summary: str
    trainer: str
    """Dotted path of the nnU-Net trainer."""
    dimensions: tuple[int, ...]
    docs: str
    """Page, relative to the repository."""
    settings: str = ""
    """Dotted path of the dataclass behind the ``method`` part of a plan's ``finetuning`` block, where it reads one."""

    @property
    def trainer_name(self) -> str:
        """What ``nnUNetv2_train -tr`` takes."""
        return self.trainer.rpartition(".")[2]


M3RET = Paper(
    title="M3Ret: Unleashing Zero-shot Multimodal Medical Image Retrieval via Self-Supervision",
    authors=(
        "Che Liu",
        "Zheng Jiang",
        "Chengyu Fang",
        "Heng Guo",
        "Yan-Jie Zhou",
        "Jiaqi Qu",
        "Le Lu",
        "Minfeng Xu",
    ),
)
"""Of both of its trainings."""

METHODS = {
    "mae": Method(
        title="MAE",
        summary="masked blocks of a volume restored from the rest",
        trainer="nnssl_plugin.methods.mae.trainer.MAEPretrainer",
        settings="nnssl_plugin.methods.mae.settings.Settings",
        training="nnssl_plugin.methods.mae.settings.TRAINING",
        trains=("encoder", "decoder"),
        needs="",
        dimensions=(2, 3),
        paper=Paper(
            title="Masked Autoencoders Are Scalable Vision Learners",
            authors=("Kaiming He", "Xinlei Chen", "Saining Xie", "Yanghao Li", "Piotr Dollár", "Ross Girshick"),
            venue="CVPR",
            year=2022,
            url="https://arxiv.org/abs/2111.06377",
        ),
        licence="Apache-2.0",
        docs="docs/methods/mae.md",
        presets={
            "mae": "MAE as recommended here: every default, written out",
            "mae-openmind": "nnssl's numbers for ResEnc-L: blocks of 16, 8 samples a step, 250,000 steps of its SGD",
            "mae-nnfoundation": "the numbers of nnFoundation's CNN: 96 samples a step in chunks of 2, 625,000 steps of "
            "SGD",
        },
    ),
    "mae-contrast": Method(
        title="MAE with aligned contrast",
        summary="masked blocks restored in two overlapping crops of a volume, and the points that both show told apart",
        trainer="nnssl_plugin.methods.mae.contrast.trainer.MAEContrastPretrainer",
        settings="nnssl_plugin.methods.mae.contrast.settings.Settings",
        training="nnssl_plugin.methods.mae.contrast.settings.TRAINING",
        trains=("encoder", "decoder"),
        needs="",
        dimensions=(2, 3),
        paper=Paper(
            title="Consistent View Alignment Improves Foundation Models for 3D Medical Image Segmentation",
            authors=("Puru Vaish", "Felix Meister", "Tobias Heimann", "Christoph Brune", "Jelmer M. Wolterink"),
            year=2025,
            url="https://arxiv.org/abs/2509.13846",
        ),
        licence="Apache-2.0",
        docs="docs/methods/mae-contrast.md",
        presets={"mae-contrast": "MAE with aligned contrast as recommended here: every default, written out"},
    ),
    "m3ret-mae": Method(
        title="M3Ret, MAE",
        summary="masked patches of whole images, videos and volumes restored by one transformer",
        trainer="nnssl_plugin.methods.m3ret.mae.trainer.M3RetMAEPretrainer",
        settings="nnssl_plugin.methods.m3ret.mae.settings.Settings",
        training="nnssl_plugin.methods.m3ret.mae.settings.TRAINING",
        trains=("encoder",),
        needs="",
        dimensions=(2, 3),
        paper=M3RET,
        licence="Apache-2.0",
        docs="docs/methods/m3ret.md",
        presets={
            "m3ret-mae": "M3Ret's MAE as recommended here: every default, written out",
            "m3ret-mae-paper": "the paper's numbers: three channels in [0, 1], the sum over a patch's numbers",
        },
        networks=("Primus", "PatchViT"),
    ),
    "m3ret-simdino": Method(
        title="M3Ret, SimDINO",
        summary="views of whole images, videos and volumes aligned, and images kept apart by the coding rate",
        trainer="nnssl_plugin.methods.m3ret.simdino.trainer.M3RetSimDINOPretrainer",
        settings="nnssl_plugin.methods.m3ret.simdino.settings.Settings",
        training="nnssl_plugin.methods.m3ret.simdino.settings.TRAINING",
        trains=("encoder",),
        needs="",
        dimensions=(2, 3),
        paper=M3RET,
        licence="Apache-2.0",
        docs="docs/methods/m3ret.md",
        presets={
            "m3ret-simdino": "M3Ret's SimDINO as recommended here: every default, written out",
            "m3ret-simdino-paper": "the paper's numbers: three channels in [0, 1], ten local views of images and four "
            "of videos and volumes, the coding rate as its equation 4 has it",
        },
    ),
    "distillation": Method(
        title="Distillation",
        summary="the maps of a frozen network, of any checkpoint, taught to the planned network",
        trainer="nnssl_plugin.methods.distillation.trainer.DistillationPretrainer",
        settings="nnssl_plugin.methods.distillation.settings.Settings",
        training="nnssl_plugin.methods.distillation.settings.TRAINING",
        trains=("encoder",),
        needs="a checkpoint to learn from (`method.teacher`)",
        dimensions=(2, 3),
        paper=Paper(
            title="FitNets: Hints for Thin Deep Nets",
            authors=(
                "Adriana Romero",
                "Nicolas Ballas",
                "Samira Ebrahimi Kahou",
                "Antoine Chassang",
                "Carlo Gatta",
                "Yoshua Bengio",
            ),
            venue="ICLR",
            year=2015,
            url="https://arxiv.org/abs/1412.6550",
        ),
        licence="Apache-2.0",
        docs="docs/methods/distillation.md",
        presets={
            "distillation": "distillation as recommended here: every default, written out; name the teacher beside it"
        },
    ),
    "med3dinsight": Method(
        title="Med3DInsight",
        summary="volumes aligned with the frozen embeddings of a slice and its description, and masked reconstruction",
        trainer="nnssl_plugin.methods.med3dinsight.trainer.Med3DInsightPretrainer",
        settings="nnssl_plugin.methods.med3dinsight.settings.Settings",
        training="nnssl_plugin.methods.med3dinsight.settings.TRAINING",
        trains=("encoder", "decoder"),
        needs="slices with texts (`nnssl_plugin caption`)",
        dimensions=(3,),
        paper=Paper(
            title="Enhancing 3D Medical Image Understanding with Pretraining Aided by 2D Multimodal Large Language"
            " Models",
            authors=("Qiuhui Chen", "Xuancheng Yao", "Huping Ye", "Yi Hong"),
        ),
        licence="Apache-2.0",
        docs="docs/methods/med3dinsight.md",
        presets={
            "med3dinsight": "Med3DInsight as recommended here: every default, written out",
            "med3dinsight-paper": "the numbers that the paper states, and its reading of the input. [Not all of it is "
            "literal](#how-literal-the-papers-presets-are)",
        },
        alignment="nnssl_plugin.methods.med3dinsight.alignment.load_alignment",
    ),
    "s2dc": Method(
        title="S2DC",
        summary="patches matched between two views of a volume, softened within structures",
        trainer="nnssl_plugin.methods.s2dc.trainer.S2DCPretrainer",
        settings="nnssl_plugin.methods.s2dc.settings.Settings",
        training="nnssl_plugin.methods.s2dc.settings.TRAINING",
        trains=("encoder",),
        needs="",
        dimensions=(2, 3),
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
        presets={
            "s2dc": "S2DC as recommended here: every default, written out",
            "s2dc-paper": "the numbers that the paper states: 100,000 steps, weights of 1, dual softmax, no "
            "temperature before it. [Not all of it is literal](#how-literal-the-papers-presets-are)",
            "s2dc-reference": "the numbers of the paper's public code: bottleneck tokens, Sinkhorn, weights of 0.5, a "
            "queue of 90, rotations in the plane",
        },
    ),
    "brainmvp": Method(
        title="BrainMVP",
        summary="a modality restored from another one of the case and from a template of its own, which is learned",
        trainer="nnssl_plugin.methods.brainmvp.trainer.BrainMVPPretrainer",
        settings="nnssl_plugin.methods.brainmvp.settings.Settings",
        training="nnssl_plugin.methods.brainmvp.settings.TRAINING",
        trains=("encoder", "decoder"),
        needs="cases with several co-registered modalities (`nnssl_plugin prepare --modalities`)",
        dimensions=(3,),
        paper=Paper(
            title="Multi-modal Vision Pre-training for Medical Image Analysis",
            authors=(
                "Shaohao Rui",
                "Lingzhi Chen",
                "Zhenyu Tang",
                "Lilong Wang",
                "Mianxin Liu",
                "Shaoting Zhang",
                "Xiaosong Wang",
            ),
            url="https://arxiv.org/abs/2410.10604",
        ),
        licence="Apache-2.0",
        docs="docs/methods/brainmvp.md",
        presets={
            "brainmvp": "BrainMVP as recommended here: every default, written out",
            "brainmvp-paper": "the numbers that the paper states: 1,500 epochs, 3 cases a step, one learning rate. "
            "[Not all of it is literal](#how-literal-the-papers-presets-are)",
            "brainmvp-reference": "the numbers of the paper's public code: a grid of blocks, 0.8 of them, a weight of "
            "10 for the distillation, templates scaled to [0, 1], a fifth of the run from templates alone",
        },
        finetuning="brainmvp-segmentation",
    ),
    "lvm-med": Method(
        title="LVM-Med",
        summary="images of a batch told apart by matching the graphs of their two views, edges included",
        trainer="nnssl_plugin.methods.lvm_med.trainer.LVMMedPretrainer",
        settings="nnssl_plugin.methods.lvm_med.settings.Settings",
        training="nnssl_plugin.methods.lvm_med.settings.TRAINING",
        trains=("encoder",),
        needs="",
        dimensions=(2,),
        paper=Paper(
            title="LVM-Med: Learning Large-Scale Self-Supervised Vision Models for Medical Imaging via Second-order "
            "Graph Matching",
            authors=(
                "Duy M. H. Nguyen",
                "Hoang Nguyen",
                "Nghiem T. Diep",
                "Tan N. Pham",
                "Tri Cao",
                "Binh T. Nguyen",
                "Paul Swoboda",
                "Nhat Ho",
                "Shadi Albarqouni",
                "Pengtao Xie",
                "Daniel Sonntag",
                "Mathias Niepert",
            ),
            venue="NeurIPS",
            year=2023,
            url="https://arxiv.org/abs/2306.11925",
        ),
        licence="Apache-2.0",
        docs="docs/methods/lvm-med.md",
        presets={
            "lvm-med": "LVM-Med as recommended here: every default, written out",
            "lvm-med-paper": "the numbers that the paper states: noise of scale 1, batches of 200 on each of 16 ranks, "
            "100 epochs. [Not all of it is literal](#how-literal-the-papers-presets-are)",
        },
        networks=PLANAR_NETWORKS,
    ),
}
"""Name → method; its folder is that of its trainer."""

TASKS = {
    "segmentation": Task(
        summary="fine-tuning with a plan that `adapt` wrote, or from scratch on the same schedule",
        trainer="nnssl_plugin.tasks.segmentation.trainer.PretrainedSegmentationTrainer",
        dimensions=(2, 3),
        docs="docs/how-to/fine-tune.md",
    ),
    "classification": Task(
        summary="classification, from scratch or with a plan that `adapt` wrote",
        trainer="nnssl_plugin.tasks.classification.trainer.PretrainedClassificationTrainer",
        dimensions=(2, 3),
        docs="docs/how-to/classify.md",
    ),
    "brainmvp-segmentation": Task(
        summary="segmentation from BrainMVP's weights, with modalities replaced by their templates at random",
        trainer="nnssl_plugin.methods.brainmvp.finetuning.trainer.BrainMVPSegmentationTrainer",
        dimensions=(2, 3),
        docs="docs/methods/brainmvp.md",
        settings="nnssl_plugin.methods.brainmvp.finetuning.settings.Settings",
    ),
    "brainmvp-classification": Task(
        summary="classification from BrainMVP's weights, with modalities replaced by their templates at random",
        trainer="nnssl_plugin.methods.brainmvp.finetuning.trainer.BrainMVPClassificationTrainer",
        dimensions=(2, 3),
        docs="docs/methods/brainmvp.md",
        settings="nnssl_plugin.methods.brainmvp.finetuning.settings.Settings",
    ),
}
"""Name (that of the task's folder, or of a method's own fine-tuning) → task with a trainer."""

RELATED_PAPERS = {
    "nnU-Net": Paper(
        title="nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
        authors=("Fabian Isensee", "Paul F. Jaeger", "Simon A. A. Kohl", "Jens Petersen", "Klaus H. Maier-Hein"),
        venue="Nature Methods",
        year=2021,
        doi="10.1038/s41592-020-01008-z",
    ),
    "M³Ret": Paper(
        title="M³Ret: Unleashing Zero-shot Multimodal Medical Image Retrieval via Self-Supervision",
        authors=(
            "Che Liu",
            "Zheng Jiang",
            "Chengyu Fang",
            "Heng Guo",
            "Yan-Jie Zhou",
            "Jiaqi Qu",
            "Le Lu",
            "Minfeng Xu",
        ),
        year=2025,
    ),
}
"""What a paper is known by → a paper that ``CITATION.cff`` names beside those of the methods."""
