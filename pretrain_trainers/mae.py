"""MAE's trainer, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.mae.trainer import MAEPretrainer as MAEPretrainer
