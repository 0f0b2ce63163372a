"""Distillation's trainer, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.distillation.trainer import DistillationPretrainer as DistillationPretrainer
