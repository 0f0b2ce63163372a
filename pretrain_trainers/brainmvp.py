"""BrainMVP's trainer, for nnU-Net's -tr: a re-export only."""

from nnssl_plugin.methods.brainmvp.trainer import BrainMVPPretrainer as BrainMVPPretrainer
