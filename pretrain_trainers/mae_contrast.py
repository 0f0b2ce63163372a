"""The trainer of MAE with aligned contrast, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.mae.contrast.trainer import MAEContrastPretrainer as MAEContrastPretrainer
