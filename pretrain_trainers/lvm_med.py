"""LVM-Med's trainer, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.lvm_med.trainer import LVMMedPretrainer as LVMMedPretrainer
