"""S2DC's trainer, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.s2dc.trainer import S2DCPretrainer as S2DCPretrainer
