"""Fine-tuning trainers, for nnU-Net's -tr: re-exports only, as nnU-Net forgets the modules of this folder."""

from nnssl_plugin.methods.brainmvp.finetuning.trainer import BrainMVPClassificationTrainer, BrainMVPSegmentationTrainer
from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer
from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer

__all__ = [
    "BrainMVPClassificationTrainer",
    "BrainMVPSegmentationTrainer",
    "PretrainedClassificationTrainer",
    "PretrainedSegmentationTrainer",
]
